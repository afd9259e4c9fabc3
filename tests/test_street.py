"""The street: the annotation, the film that is refused, and the set that is made from frames."""

import sys

import pytest
import torch
from PIL import Image

from mra import ranking
from mra.config import PRESETS, UserError
from mra.data.tokenizer import Tokenizer
from mra.formats.read import load
from tests.street import cut, spread

STREET = cut.STREET


def test_the_annotation_is_what_the_readme_says():
    rows = {split: [row for row in STREET["people"] if cut.split_of(row[0]) == split] for split in ("train", "test")}
    assert {split: (len(found), len({row[5] for row in found})) for split, found in rows.items()} == {
        "train": (161, 8), "test": (189, 7)}
    assert len({row[5] for row in STREET["people"]}) == 9 and len(STREET["unlabelled"]) == 177
    assert all(cut.split_of(row[0]) == "train" for row in STREET["unlabelled"])
    for frame, left, top, right, bottom, *_ in STREET["people"] + STREET["unlabelled"]:
        assert 0 <= frame < STREET["film"]["frames"]
        assert 0 <= left < right <= STREET["film"]["width"] and 0 <= top < bottom <= STREET["film"]["height"]


def test_ten_sentences_and_two_for_each_person():
    captions, tokenizer, longest = STREET["captions"], Tokenizer.read(), PRESETS["demo"].max_tokens
    assert list(captions) == [str(person) for person in range(1, 10)]
    assert all((len(own["first"]), len(own["further"])) == (2, 10) for own in captions.values())
    sentences = [sentence for own in captions.values() for sentence in own["first"] + own["further"]]
    assert len(set(sentences)) == 9 * 12
    for sentence in sentences:
        ids = tokenizer.encode(sentence, longest + 1)
        assert tokenizer.unk_id not in ids and len(ids) <= longest, sentence


def test_the_set_is_read_as_cuhk(tmp_path):
    """Frame n has the colour (n // 4, 0, 9), so a crop shows which frame it was cut from."""
    frames = (Image.new("RGB", (768, 576), (number // 4, 0, 9)) for number in range(STREET["film"]["frames"]))
    cut.write_set(frames, tmp_path)
    for split, count, captions in (("train", 161, 2), ("test", 189, 10)):
        records = load("cuhk", split, tmp_path).records
        assert len(records) == count and {len(record.captions) for record in records} == {captions}
    frame, left, top, right, bottom, person, _ = STREET["people"][-1]
    crop = Image.open(tmp_path / f"CUHK-PEDES/imgs/test/f{frame}_p{person}.png")
    assert crop.size == (right - left, bottom - top) and crop.getpixel((0, 0)) == (frame // 4, 0, 9)
    assert len(list((tmp_path / "unlabelled").iterdir())) == 177
    assert len((tmp_path / "sentences.txt").read_text().splitlines()) == 7 * 10


def test_what_cannot_be_cut_is_said_in_one_sentence(tmp_path, monkeypatch, capsys):
    film = tmp_path / "vtest.avi"
    film.write_bytes(b"another film")
    monkeypatch.setattr(sys, "argv", ["cut", str(film), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        cut.main()
    assert f"{film} is not the annotated vtest.avi" in capsys.readouterr().err
    with pytest.raises(UserError, match="the package opencv-doc has the film"):
        cut.check_film(tmp_path / "missing.avi")
    monkeypatch.setitem(sys.modules, "cv2", None)       # importing it raises ImportError
    with pytest.raises(UserError, match="OpenCV is missing"):
        next(cut.frames_of(film))
    with pytest.raises(UserError, match="the first is 4;"):
        cut.write_set([Image.new("RGB", (768, 576))] * 4, tmp_path / "out")


def test_rows_of_single_queries_average_to_the_metrics_of_the_search():
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(34, 8), dim=1)
    queries, gallery = features.split([4, 30])
    similarity, candidates = (queries @ gallery.T).topk(12)
    found = ranking.Found(queries, gallery, similarity, candidates, torch.randn(4, 5))
    ids, last = (torch.arange(4), torch.arange(30) % 4), found.reranked(1.0)
    rows = spread.rows_of(found, last, *ids)
    assert rows.shape == (4, 5) and ranking.means(rows) == pytest.approx(found.metrics(*ids, last))
