"""The street: the annotation, the film that is refused, the set that is made from frames, and runs without labels."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from PIL import Image
from test_commands import command, succeed
from test_study import in_process

from mra import ranking
from mra.config import PRESETS, UserError
from mra.data.augment import tensor_of
from mra.data.tokenizer import Tokenizer, pad
from mra.data.words import swap_left_right
from mra.formats.read import load
from mra.weights.retrievers import load_retriever
from tests.street import cut, protocols, spread
from tests.study import study

STREET = cut.STREET
PROTOCOLS = "tests/street/protocols.py"


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


@pytest.fixture(scope="module")
def quick(in_town) -> tuple[Path, str]:
    """Where the protocol without labels ran at tiny size on crops of noise, and what it printed."""
    folder = in_town("street")
    noise = Image.effect_noise((192, 144), 90).convert("RGB").resize((768, 576))
    few = [Image.blend(noise, Image.new("RGB", noise.size, (30 * number, 90, 200)), 0.6) for number in range(8)]
    cut.write_set((few[number // 4 % 8] for number in range(STREET["film"]["frames"])), folder / "street")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "call", in_process)
        said = succeed(folder, PROTOCOLS, "street", "--quick", "--protocols", "no-labels")
    return folder, said


def test_the_set_without_labels_tells_nobodys_identity(quick):
    folder, _ = quick
    target, source = (load("cuhk", "train", folder / "street/quick/no-labels", say=study.quiet).records,
                      load("sda", "train", folder / "data/demo-tiny", say=study.quiet).records)
    assert len(target) == 161 + 177 == len({record.identity for record in target})
    known = {caption for record in source for caption in record.captions}
    assert all(len(set(record.captions)) == 2 and known.issuperset(record.captions) for record in target)
    names = [Path(record.path).stem for record in target]
    assert names == sorted(names) and all(name[0] == "f" and int(name[1:4]) < STREET["test_from"] for name in names)
    assert not any(f"_p{person}" in name for name in names for person in range(1, 10))
    frame, left, top, right, bottom, person, _ = STREET["people"][0]
    crop = Image.open(folder / f"street/quick/no-labels/CUHK-PEDES/imgs/f{frame:03}_x{left:03}.png")
    assert crop.tobytes() == Image.open(folder / f"street/CUHK-PEDES/imgs/train/f{frame:03}_p{person}.png").tobytes()
    assert crop.size == (right - left, bottom - top)


def test_the_sentences_of_a_crop_are_the_nearest_with_mirror_images_averaged(quick):
    folder, _ = quick
    model, tokenizer, _ = load_retriever(folder / "street/quick/first/best.safetensors", torch.device("cpu"))
    target, source = (load("cuhk", "train", folder / "street/quick/no-labels", say=study.quiet).records,
                      load("sda", "train", folder / "data/demo-tiny", say=study.quiet).records)
    images = torch.stack([tensor_of(Image.open(record.path), (32, 16)) for record in target])
    captions = sorted({caption for record in source for caption in record.captions})
    passes = []
    for view, words in ((images, captions), (images.flip(-1), map(swap_left_right, captions))):
        ids, keep = pad([tokenizer.encode(caption, model.config.max_tokens) for caption in words], tokenizer.pad_id)
        with torch.inference_mode():
            passes.append(model.encode_image(view)[1] @ model.encode_text(ids, keep)[1].T)      # (338, captions)
    of_both, of_one = (similarity.topk(2).indices.tolist() for similarity in (sum(passes), passes[0]))
    assert [list(record.captions) for record in target] == [[captions[i] for i in own] for own in of_both]
    assert of_both != of_one        # else nothing is said of the mirror images


def test_every_arm_has_a_row_with_the_spread_over_ten_sets(quick):
    folder, said = quick
    assert "Without --plain CHECKPOINT these arms are left out: source, dad on plain." in said
    table = (folder / "street/quick/table.md").read_text()
    assert table in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[:4] for row in rows] == [["none", "augmented", "with", "1"]] + [
        ["no-labels", arm, losses, "1"] for arm in ("moments", "dad") for losses in ("with", "without")]
    sets = json.loads((folder / "street/quick/no-labels/dad-noregions-s0.json").read_text())["sets"]
    expected = [sets[stage][name] for stage in ("embeddings", "re-ranked") for name in ("R@1", "mAP")]
    assert {len(values) for values in expected} == {10}
    assert rows[4][4:] == [f"{mean(values):.1f} +- {stdev(values):.1f}" for values in expected]
    drawn, whole = (Image.open(folder / f"street/{name}.png") for name in ("drawn", "adaptation"))
    assert whole.width == drawn.width and 2 * whole.height == 3 * drawn.height


def test_the_second_stage_starts_where_it_should_on_images_of_the_arm(quick):
    folder, _ = quick
    place = folder / "street/quick/no-labels"
    for name, images, regions in (("dad-s0", "dad-s0", True), ("dad-noregions-s0", "dad-s0", False),
                                  ("moments-s0", "moments-s0", True)):
        train = load_retriever(place / name / "best.safetensors", torch.device("cpu"))[2]["train"]
        assert Path(train["dataset"]) == place / "sets" / images and train["regions"] is regions
        assert Path(train["init"]) == folder / "street/quick/first/best.safetensors"
        assert train["lr"] == pytest.approx(4e-4) and train["fusion_from"] == 0
    source = {record.captions[0]: record for record in load("sda", "train", folder / "data/demo-tiny",
                                                            say=study.quiet).records}
    rows = json.loads(next((place / "sets/moments-s0").glob("sda_*.json")).read_text())
    assert len(rows) == len(source) and all(row["image_id"] == source[row["caption"]].identity for row in rows)


def test_what_is_finished_is_not_made_again(quick):
    folder, _ = quick
    before = {path: path.stat().st_mtime_ns for path in (folder / "street/quick/no-labels").rglob("*.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "call", lambda script, *flags: None)
        succeed(folder, PROTOCOLS, "street", "--quick", "--protocols", "no-labels")
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) > 5


def test_the_runs_and_their_summary():
    given = Namespace(plain=Path("plain"), arms=protocols.ARMS, protocols=protocols.PROTOCOLS, seeds=None, quick=False)
    runs = list(protocols.plan(given))
    assert len(runs) == len({(one.protocol, one.name) for one in runs}) == 2 + 3 * (5 + 3 + 5)
    given.plain, given.seeds = None, [7]
    assert {one.arm for one in protocols.plan(given)} == {"augmented", "moments", "dad"}
    assert len(list(protocols.plan(given))) == 1 + 4 + 2 + 4
    assert protocols.summary([[0.0, 20.0], [20.0, 60.0]]) == "25.0 +- 21.2 (21.2)"


def test_a_person_is_all_that_no_words_says(quick):
    folder, _ = quick
    place = protocols.Place(folder / "street", folder / "data/demo-tiny",
                            folder / "street/quick/first/best.safetensors", None, True)
    protocols.write_target("no-words", place)
    records = load("cuhk", "train", folder / "street/quick/no-words", say=study.quiet).records
    assert len(records) == 338 and {record.captions for record in records} == {("a person",)}


def test_missing_crops_and_checkpoints_are_told_in_one_sentence(tmp_path, quick):
    for flags, told in (((str(tmp_path),), "holds no crops"), (("street", "--plain", "x"), "is no such checkpoint"),
                        (("street", "--quick", "--arms", "source"), "No run is left")):
        status, _, err = command(quick[0], PROTOCOLS, *flags)
        assert status == 2 and told in err and err.count("\n") == 1
