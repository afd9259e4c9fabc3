"""`evaluate.py --gallery`: photographs ranked for sentences and pictures, each pair as by hand; encoded only once."""

import dataclasses
import json
import math
import os
import re
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from mra import ranking
from mra.config import UserError
from mra.data import files, words
from mra.data.augment import tensor_of
from mra.data.files import open_image
from mra.ranking import Settings
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.run.command import run
from mra.show import gallery
from mra.show.gallery import Gallery, unread
from mra.weights.clip import ClipTokenizer
from mra.weights.retrievers import model_facts
from tests.test_ranking import pair_by_hand
from tests.test_released import small, write  # noqa: F401 (fixtures: a small released checkpoint)

ASKED = ["a man in a red coat with a bag on his left", "a woman", "black hat"]


def encode_folder(folder: Path, model: Retriever, cache: Path, settings: Settings, say=print):
    """As evaluate.py --gallery encodes a folder."""
    return gallery.encode(str(folder), gallery.photographs(folder, say), model, cache, settings, say)


@pytest.fixture
def folder(tmp_path, paint) -> Path:
    """Five photographs in four formats and sizes, nested; a corrupt one, hidden files and others."""
    home = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b/c d.JPG", "b/ünï/e.webp", "b/f.TIFF", "g.jp2")):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(paint(f"{number}.png", seed=number)).resize((20 + 9 * number, 40 + number)).save(home / name)
    for name in ("b/broken.jpg", ".thumbnails/t.png", "b/._a.png", "notes.txt", "b/IMG_1.HEIC", "IMG_2.heic"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(b"no image")
    return home


@pytest.fixture
def ours(tmp_path, model, tokenizer) -> Path:
    """A checkpoint of the fixture `model`."""
    path = tmp_path / "out/ours/best.safetensors"
    path.parent.mkdir(parents=True)
    facts = {"train": {"preset": "tiny", "dataset": "cuhk", "seed": 0, "data_root": ""}, "val": {"weight": 1.0}}
    checkpoint.save(path, checkpoint.weights(model), model_facts(model, tokenizer) | facts
                    | {"pretrained_on": "nothing"})
    return path


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Run evaluate.py with flags in the test's folder: what it printed, its query.json, how many images it encoded.

    One that cannot be read is none of these.
    """
    monkeypatch.chdir(tmp_path)
    real, encoded = ranking.encode_gallery, []

    def encode(*given) -> torch.Tensor:
        features = real(*given)
        encoded.append(int(features.isfinite().all(-1).all(-1).sum()))
        return features
    monkeypatch.setattr(ranking, "encode_gallery", encode)

    def go(*flags, out: str = "out/ours") -> tuple[str, dict, int]:
        encoded.clear()
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--device", "cpu", *map(str, flags)])
        evaluate.main()
        return capsys.readouterr().out, json.loads(Path(out, "query.json").read_text()), sum(encoded)
    return go


def test_a_folder_is_ranked_as_by_hand(ask, ours, folder, model, tokenizer):
    """Logit + 1 x similarity, each the mean with the mirrored photograph and the mirrored words.

    What is said is the logit's probability.
    """
    Path("asked.txt").write_text("\ufeff" + "\n\n".join(ASKED[1:]) + "\n", encoding="utf-8")
    out, found, encoded = ask("--query", ASKED[0], "--queries", "asked.txt", "--gallery", "photos")
    paths = [f"photos/{name}" for name in ("a.png", "b/c d.JPG", "b/f.TIFF", "b/ünï/e.webp", "g.jp2")]
    assert encoded == found["images"] == 5 and found["gallery"] == "photos"
    assert [answer["query"] for answer in found["answers"]] == ASKED
    for answer in found["answers"]:
        truth = {}
        for path in paths:
            passes = [pair_by_hand(model, tokenizer, answer["query"], path, False),
                      pair_by_hand(model, tokenizer, words.swap_left_right(answer["query"]), path, True)]
            truth[path] = torch.tensor(passes).mean(0).tolist()
        assert [row["path"] for row in answer["first"]] == sorted(paths, key=lambda path: -sum(truth[path]))
        for row in answer["first"]:
            similarity, logit = truth[row["path"]]
            assert row["similarity"] == pytest.approx(similarity, abs=1e-5)
            assert row["match"] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)
    assert set(found["meaning"]) == {"similarity", "match"} and (found["query_image"], found["threshold"]) == ("", -1)
    for name, meaning in found["meaning"].items():
        assert f"\n{name}: {meaning}.\n" in out
    assert len(found["left_out"]) == 1 and "photos/b/broken.jpg" in found["left_out"][0]
    assert re.search("^Left out: .*photos/b/broken.jpg", out, re.M) and "2 '.heic', 1 '.txt'" in out
    assert len(re.findall(r"^ +\d+  similarity -?[01]\.\d{3}  match [01]\.\d{3}  '.*photos/", out, re.M)) == 15
    with Image.open("out/ours/query.png") as picture:
        assert picture.height > 3 * 192


def test_what_has_not_changed_is_not_encoded_again(ask, ours, folder, model):
    flags = ("--query", ASKED[0], "--gallery", "photos", "--checkpoint", ours)
    _, first, encoded = ask(*flags)
    before = (ours.parent / "gallery.safetensors").stat()
    out, again, none = ask(*flags)
    assert (encoded, none) == (5, 0) and again == first and "broken.jpg" in out
    after = (ours.parent / "gallery.safetensors").stat()        # not even written anew, for all the broken photograph
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert ask("--query", ASKED[1], "--gallery", folder, "--k", "0")[2] == 0        # named otherwise, the same files

    Image.new("RGB", (30, 60), "red").save("photos/a.png")                          # other bytes
    os.utime("photos/g.jp2", ns=(1, 1))                                             # another time
    os.rename("photos/b/f.TIFF", "photos/f.TIFF")                                   # another place
    os.remove("photos/b/c d.JPG")
    _, changed, encoded = ask(*flags)
    assert encoded == 3 and changed["images"] == 4
    paths = [f"photos/{name}" for name in ("a.png", "b/ünï/e.webp", "f.TIFF", "g.jp2")]
    fresh = ranking.encode_gallery(model, ranking.Images(paths, model.config), Settings(0))
    kept, features, _ = encode_folder(Path("photos"), model, ours.parent / "gallery.safetensors", Settings(0))
    assert kept == paths and len(checkpoint.load(ours.parent / "gallery.safetensors")[0]) == len(fresh)
    torch.testing.assert_close(features, fresh, atol=1e-6, rtol=0)


def test_earlier_results_and_linked_folders_are_no_photographs(ask, ours, folder):
    (folder / "linked").symlink_to(folder / "b")
    for _ in range(2):
        _, found, _ = ask("--query", ASKED[0], "--gallery", "photos", "--checkpoint", ours, "--out", "photos/found",
                          out="photos/found")
        assert found["images"] == 5
    assert Path("photos/found/query.png").is_file()
    # from another --out, too; names alone do not hide one's own photographs
    for name in ("query.jpg", "ranking-7.jpg"):
        Image.open(folder / "a.png").save(folder / name)
    assert ask("--query", ASKED[0], "--gallery", "photos", "--checkpoint", ours)[1]["images"] == 7


def test_another_precision_is_encoded_anew(ask, ours, folder):
    flags = ("--query", ASKED[0], "--gallery", "photos", "--precision")
    assert [ask(*flags, precision)[2] for precision in ("float32", "bf16", "bf16")] == [5, 5, 0]


def test_embeddings_of_another_run_are_not_taken_for_ones_own(ours, folder, model, monkeypatch, tmp_path):
    """Another run writes the same file after the last write."""
    cache, real = tmp_path / "gallery.safetensors", checkpoint.save
    paths, expected, _ = encode_folder(folder, model, tmp_path / "undisturbed.safetensors", Settings(0))

    def save(path, tensors, facts):
        real(path, dict(zip(reversed(tensors), tensors.values())), facts)
    monkeypatch.setattr(checkpoint, "save", save)
    found, features, _ = encode_folder(folder, model, cache, Settings(0))
    assert found == paths and torch.equal(features, expected)


def test_other_weights_or_a_spoilt_cache_encode_everything(ask, ours, folder, model, monkeypatch):
    flags = ("--query", ASKED[0], "--gallery", "photos", "--out", "found", "--checkpoint")
    assert ask(*flags, ours, out="found")[2] == 5
    with torch.no_grad():
        model.image_projection.bias += 1e-3
    tensors, facts = checkpoint.load(ours)
    checkpoint.save(Path("other.safetensors"), checkpoint.weights(model), facts)
    assert ask(*flags, "other.safetensors", out="found")[2] == 5
    assert ask(*flags, "other.safetensors", out="found")[2] == 0
    Path("found/gallery.safetensors").write_bytes(b"cut short")
    monkeypatch.setattr(gallery, "PART", 2)                                          # written after 2, 4 and 5
    out, _, encoded = ask(*flags, "other.safetensors", out="found")
    assert encoded == 5 and "4 of 6 encoded" in out and ask(*flags, "other.safetensors", out="found")[2] == 0


def test_a_photograph_is_decoded_once_and_a_broken_one_costs_no_other(folder, model, tmp_path, monkeypatch):
    read, real, lines = [], ranking.open_image, []
    for module in (ranking, files):
        monkeypatch.setattr(module, "open_image", lambda path: read.append(Path(path).name) or real(path))
    paths, features, broken = encode_folder(folder, model, tmp_path / "gallery.safetensors", Settings(0), lines.append)
    assert sorted(read) == sorted([*{*read}, "broken.jpg"]) and len(read) == 7      # that one again, to say why
    assert len(paths) == len(features) == 5 and len(broken) == 1
    monkeypatch.setattr(gallery, "PART", 1)
    (tmp_path / "gallery.safetensors").unlink()
    again = encode_folder(folder, model, tmp_path / "gallery.safetensors", Settings(0))[1]
    torch.testing.assert_close(again, features, atol=1e-6, rtol=0)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.jpg").write_bytes(b"no image")
    for name in ("none", "missing"):
        with pytest.raises(UserError, match="no readable image"):
            encode_folder(tmp_path / name, model, tmp_path / "other.safetensors", Settings(0))


def test_a_name_that_is_no_utf8(model, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(os.fsdecode(os.fsencode(tmp_path) + b"/photos/\xff\xfe\n.png"))
    for expected in (1, 0):
        lines = []
        paths, _, _ = encode_folder(tmp_path / "photos", model, tmp_path / "x.safetensors", Settings(0), lines.append)
        assert len(paths) == 1 and f"1 files, {expected} of them to encode" in lines[0]


def test_only_candidates_are_read_again(ask, ours, folder, monkeypatch):
    flags = ("--query", ASKED[0], "--gallery", "photos", "--no-mirror", "--k", "2")
    (folder / "b/broken.jpg").unlink()          # of which nothing is known
    ask(*flags)
    read = []
    real = ranking.open_image
    monkeypatch.setattr(ranking, "open_image", lambda path: read.append(path) or real(path))
    _, found, encoded = ask(*flags)
    assert encoded == 0 and sorted(read) == sorted(row["path"] for row in found["answers"][0]["first"][:2])
    assert [len(row) for row in found["answers"][0]["first"]] == [3, 3, 2, 2, 2]


def test_a_released_checkpoint_ranks_a_folder(ask, write, folder):  # noqa: F811
    path, _ = write("swin")
    for expected in (5, 0):
        _, found, encoded = ask("--checkpoint", path, "--query", ASKED[0], "--gallery", "photos", "--out", "found",
                                out="found")
        assert encoded == expected and len(found["answers"][0]["first"]) == 5


# ---- the interface, and pictures as queries

@pytest.fixture
def twelve(model, tokenizer, paint) -> Gallery:
    """Twelve photographs, the first five re-scored."""
    paths = [paint(f"{number:02}.png", seed=number) for number in range(12)]
    settings = Settings(5)
    features = ranking.encode_gallery(model, ranking.Images(paths, model.config), settings)
    return Gallery(model, tokenizer, "cuhk", paths, features, settings, 2.0)


def test_more_hits_than_usual_and_fewer(twelve, monkeypatch):
    """The first are the same whatever their number, and of them the five most similar have a match."""
    read, real = [], ranking.open_image
    monkeypatch.setattr(ranking, "open_image", lambda path: read.append(path) or real(path))
    every, = twelve.search([ASKED[0]], listed=100)
    assert sorted(hit.path for hit in every) == twelve.paths and len(read) == 5
    assert [hit.match is not None for hit in every] == 5 * [True] + 7 * [False]
    scores = [math.log(hit.match / (1 - hit.match)) + 2 * hit.similarity for hit in every[:5]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    rest = [hit.similarity for hit in every[5:]]
    assert rest == sorted(rest, reverse=True) and rest[0] <= min(hit.similarity for hit in every[:5])
    for flags, count in (({}, 10), ({"listed": 3}, 3), ({"listed": 11}, 11)):
        _, found = twelve.search([ASKED[1], ASKED[0]], **flags)
        assert [hit.path for hit in found] == [hit.path for hit in every[:count]]
        assert [hit.similarity for hit in found] == pytest.approx([hit.similarity for hit in every[:count]], abs=1e-6)


def test_a_threshold_drops_hits_before_the_first_are_taken(twelve):
    """A hit that matches well but is less similar gives way to the next."""
    every, = twelve.search([ASKED[0]], listed=12)
    for dropped in range(13):
        limit = sorted(hit.similarity for hit in every)[dropped] if dropped < 12 else 1.0
        kept = [hit.path for hit in every if hit.similarity >= limit]
        found, = twelve.search([ASKED[0]], listed=2, threshold=limit)
        assert [hit.path for hit in found] == kept[:2] and len(kept) == 12 - dropped


@pytest.mark.parametrize("mirror", [True, False])
def test_a_picture_ranks_as_by_hand(twelve, paint, mirror):
    """Similarity of picture and photograph, and of their mirror images; with a sentence the mean of both."""
    model = twelve.model
    searched = dataclasses.replace(twelve, settings=Settings(5, mirror), weight=1.0)
    mine, other = open_image(twelve.paths[7]), open_image(paint("other.png", seed=99))

    def feature(picture: Image.Image, mirrored: bool) -> torch.Tensor:
        pixels = tensor_of(picture, (model.config.height, model.config.width), mirrored=mirrored)[None]
        with torch.inference_mode():
            return model.encode_image(pixels)[1][0]

    def by_hand(sentence: str, image: Image.Image, path: str) -> float:
        found = []
        for mirrored in ([False, True] if mirror else [False]):
            parts = [(feature(image, mirrored) @ feature(open_image(path), mirrored)).item()]
            if sentence:
                words_seen = words.swap_left_right(sentence) if mirrored else sentence
                parts.append(pair_by_hand(model, twelve.tokenizer, words_seen, path, mirrored)[0])
            found.append(sum(parts) / len(parts))
        return sum(found) / len(found)

    for image in (mine, other):
        asked = ["", ASKED[0], ASKED[1]]
        for sentence, hits in zip(asked, searched.search(asked, image, listed=12), strict=True):
            truth = {path: by_hand(sentence, image, path) for path in twelve.paths}
            assert {hit.path: hit.similarity for hit in hits} == pytest.approx(truth, abs=1e-5)
            assert [hit.path for hit in hits] == sorted(truth, key=lambda path: -truth[path])
            assert all(hit.match is None for hit in hits)
    assert searched.search([""], mine)[0][0] == (twelve.paths[7], pytest.approx(1), None)


def test_a_picture_is_encoded_once_for_many_sentences(twelve, paint, monkeypatch):
    picture, real, counted = open_image(paint("other.png", seed=99)), ranking.encode_gallery, []
    monkeypatch.setattr(ranking, "encode_gallery", lambda model, images, settings: counted.append(len(images))
                        or real(model, images, settings))
    assert len(twelve.search(list(ASKED), picture)) == 3 and counted == [1]


def test_a_picture_on_the_command_line(ask, ours, folder):
    name = "a man in a red coat.png"        # no sentence, for all that
    Image.open(folder / "a.png").save(name)
    flags = ("--query-image", name, "--gallery", "photos")
    out, found, _ = ask(*flags)
    answer, = found["answers"]
    best = answer["first"][0]
    assert (answer["query"], found["query_image"], best["path"]) == ("", name, "photos/a.png")
    assert best["similarity"] == pytest.approx(1)
    assert all("match" not in hit for hit in answer["first"]) and "match:" not in out
    assert f"\n{name!r}:\n" in out and "no word" not in out
    with Image.open("out/ours/query.png") as picture:
        alone = picture.size
    out, found, _ = ask(*flags, "--query", *ASKED[1:])
    assert [answer["query"] for answer in found["answers"]] == ASKED[1:] and f"\n{ASKED[1]!r}:\n" in out
    with Image.open("out/ours/query.png") as picture:
        assert picture.height == 2 * alone[1]


def test_a_threshold_on_the_command_line(ask, ours, folder):
    flags = ("--query", *ASKED, "--gallery", "photos")
    _, every, _ = ask(*flags)
    limit = sorted(hit["similarity"] for answer in every["answers"] for hit in answer["first"])[9]
    out, found, _ = ask(*flags, "--threshold", limit)
    for whole, some in zip(every["answers"], found["answers"]):
        assert some["first"] == [hit for hit in whole["first"] if hit["similarity"] >= limit]
    assert found["threshold"] == limit and len(re.findall(r"^ +\d+  similarity", out, re.M)) == 6
    out, found, _ = ask(*flags, "--threshold", "1")
    note = "no image has a similarity of 1.0 or more"
    assert [answer["first"] for answer in found["answers"]] == [[], [], []]
    assert [answer["note"] for answer in found["answers"]] == [note] * 3 and out.count(note) == 3
    with Image.open("out/ours/query.png") as picture:
        assert picture.height > 3 * 192


def test_words_that_are_not_read_are_counted(tokenizer, ask, ours, folder):
    """56 ids are [CLS], 54 pieces and [SEP]; "xq" is two pieces. Without merges CLIP has a piece for each letter."""
    assert unread("a " * 54, tokenizer, "cuhk", 56) == []
    assert unread("a " * 53 + "xq", tokenizer, "cuhk", 56) == [
        "The sentence: the model does not read the last 1 of its 54 words."]
    assert "the last 7 of its 61 words" in unread("a-" * 60 + "a", tokenizer, "icfg", 56)[0]     # as it is cleaned
    assert len(unread("a " * 60 + "穿", tokenizer, "cuhk", 56)) == 1
    clip = ClipTokenizer([], Path("letters"))
    assert unread("red coat bag", clip, "", 12) == []
    for longest, count in ((11, 1), (9, 1), (8, 2), (4, 3)):
        assert f"the last {count} of its 3 words" in unread("red coat bag", clip, "", longest)[0]
    with pytest.raises(UserError, match="^The sentence: there is no word"):
        unread("?!", clip, "", 77)
    out, _, _ = ask("--query", "a coat " * 30, "--gallery", "photos")
    assert re.search(r"^--query 'a coat .*the model does not read the last 6 of its 60 words\.$", out, re.M)


@pytest.mark.parametrize("flags, named", [
    (("--query-image", "photos/b/broken.jpg", "--gallery", "photos"), "the image 'photos/b/broken.jpg' cannot be read"),
    (("--query-image", "nowhere.png"), "the image 'nowhere.png' cannot be read"),
    (("--query-image", "photos/a.png", "--query", "?!"), "no word in it"),
    (("--query-image", "photos/a.png", "--dataset", "cuhk", "icfg"), "one --dataset"),
    (("--threshold", "0.5"), "--threshold is for a search"),
    (("--query", "a coat", "--threshold", "1.5"), "--threshold 1.5"),
    (("--gallery", "photos"), "--gallery is for a search")])
def test_mistakes_in_a_search(ours, folder, tmp_path, monkeypatch, capsys, flags, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as end:
        run(evaluate.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and named in err and re.fullmatch(r"error: \S.*\S\n", err)


@pytest.mark.parametrize("content, named", [
    (None, "asked.txt: no readable"), (b"\xff\xfe\x00a man", "asked.txt: no readable"), (b"\n \n", "no word"),
    ("a man\n\n...\n".encode(), "asked.txt, line 3: '...'")])
def test_mistakes(ours, folder, tmp_path, monkeypatch, capsys, content, named):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("asked.txt").write_bytes(content)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--queries", "asked.txt", "--gallery", "photos"])
    with pytest.raises(SystemExit) as end:
        run(evaluate.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and named in err and re.fullmatch(r"error: \S.*\S\n", err)


def test_the_documented_python_ranks_a_folder(paint, tmp_path, monkeypatch, capsys):
    for number in range(3):
        Image.open(paint(f"{number}.png", seed=number)).convert("RGB").save(tmp_path / f"{number}.jpg")
    text = (Path(gallery.__file__).with_name("README.md")).read_text(encoding="utf-8").split("## From Python")[1]
    monkeypatch.chdir(Path(evaluate.__file__).parent)
    exec(textwrap.dedent(text).replace("DIR", str(tmp_path)), {})
    assert sorted(capsys.readouterr().out.splitlines()) == [str(tmp_path / f"{number}.jpg") for number in range(3)]
