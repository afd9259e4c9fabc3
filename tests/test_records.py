"""Readers against small files written by hand: irregularities of the formats, sentences of refusal."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from mra.config import TrainConfig, UserError
from mra.data import files
from mra.data.batches import PairDataset
from mra.data.files import open_image, quoted
from mra.data.records import Record, RecordSet, share_of
from mra.formats import read
from mra.formats.read import SPLITS, load, locate

RAW = {"cuhk": ("CUHK-PEDES", "reid_raw.json", "file_path"),
       "icfg": ("ICFG-PEDES", "ICFG-PEDES.json", "file_path"),
       "rstp": ("RSTPReid", "data_captions.json", "img_path")}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"image")


def raw_item(dataset: str, name: str, identity, split: str, *captions: str) -> dict:
    return {"split": split, "captions": list(captions) or ["a man"], RAW[dataset][2]: name, "id": identity,
            "processed_tokens": [["a", "man"]]}


def sda_item(name: str, identity, boxes=(), phrases=(), caption="a woman") -> dict:
    return {"image": name, "boxes": [list(box) for box in boxes], "logits": [0.5] * len(boxes),
            "phrases": list(phrases), "caption": caption, "image_id": identity}


def benchmark(root: Path, dataset: str, items: list, level="imgs", images=None) -> Path:
    folder, file, key = RAW[dataset]
    touch(root / folder / level, *(item[key] for item in items) if images is None else images)
    return write(root / folder / file, items)


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **{"say": lambda line: None, **options})
    message = str(caught.value)
    assert message.isprintable() and caught.value.__cause__ is None
    return message


def quiet(line: str) -> None:
    pass


# ---- the formats ----------------------------------------------------------------------------------

@pytest.mark.parametrize("level", ["imgs", ""])
@pytest.mark.parametrize("dataset", ["cuhk", "icfg", "rstp"])
def test_raw_benchmarks(tmp_path, dataset, level):
    items = [raw_item(dataset, "a/1.jpg", 7, "train", " A man. ", "He walks"),
             raw_item(dataset, "b/2.jpg", 900, "test"), raw_item(dataset, "a/3.jpg", 3, "train"),
             raw_item(dataset, "a/4.jpg", 7, "train"),
             raw_item(dataset, "b/5.jpg", 4, "val")]
    file = benchmark(tmp_path, dataset, items, level)
    lines = []
    train = load(dataset, "train", tmp_path, say=lines.append)
    base = tmp_path / RAW[dataset][0] / level
    assert [Path(r.path) for r in train.records] == [base / "a/1.jpg", base / "a/3.jpg", base / "a/4.jpg"]
    assert [r.identity for r in train.records] == [0, 1, 0]
    assert train.records[0].captions == ("A man.", "He walks") and train.records[0].boxes == ()
    assert (train.name, train.split) == (dataset, "train")
    assert len(lines) == 1 and file.name in lines[0] and "3 images, 4 captions, 2 identities" in lines[0]
    assert [len(load(dataset, split, tmp_path, say=quiet).records) for split in ("val", "test")] == [1, 1]


def test_odd_but_lawful_records(tmp_path):
    odd = "穿红衣 \x1b[31m if (x) { return; }\x00 \ud800"
    items = [raw_item("rstp", "0001_c5_0025.jpg", 0, "test", "same words", odd),
             raw_item("rstp", "0002_c1_0001.jpg", 1, "test", "same words", "two", "three", "four")]
    benchmark(tmp_path, "rstp", items)
    first, second = load("rstp", "test", tmp_path, say=quiet).records
    assert first.captions == ("same words", odd.replace("\ud800", "?"))
    assert len(second.captions) == 4 and (first.identity, second.identity) == (0, 1)


def test_chinese_captions_and_code_reach_the_model(tmp_path, tokenizer, config, paint):
    """As UTF-8 in the file; of a caption without a Latin word nothing is left but [CLS] and [SEP]."""
    captions = ["穿红衣的人", "A man 穿红衣 {if (x) return;}"]
    for number in range(2):
        paint(f"RSTPReid/{number}.png")
    items = [raw_item("rstp", f"{number}.png", 0, "train", *captions) for number in range(2)]
    write(tmp_path / "RSTPReid/data_captions.json", json.dumps(items, ensure_ascii=False))
    source = load("rstp", "train", tmp_path, say=quiet)
    assert source.records[1].captions == tuple(captions)
    pairs = PairDataset(source, tokenizer, config, TrainConfig(eda=0.8))
    assert pairs[0, 0].caption_ids == [2, 3] and pairs[0, 0].masked_at == []
    assert pairs[0, 1].caption_ids == pairs.encode("a man if x return")
    assert pairs.collate([pairs[0, i] for i in range(4)]).eda_keep[:, 0].all()


def test_people_of_one_image_and_ids_that_start_at_one_or_jump(tmp_path):
    items = [raw_item("cuhk", f"{i}.jpg", identity, "train") for i, identity in enumerate((1, 1, 2, 900, 4))]
    benchmark(tmp_path, "cuhk", items)
    assert [r.identity for r in load("cuhk", "train", tmp_path, say=quiet).records] == [0, 0, 1, 2, 3]


def test_underscore_name_byte_order_mark_and_own_val_of_icfg(tmp_path):
    items = [raw_item("icfg", "train/1.jpg", 0, "train"), raw_item("icfg", "test/2.jpg", 1, "test")]
    file = benchmark(tmp_path, "icfg", items)
    file.rename(file.with_name("ICFG_PEDES.json")).write_text("\ufeff" + json.dumps(items), encoding="utf-8")
    assert load("icfg", "test", tmp_path, say=quiet).records[0].path.endswith("imgs/test/2.jpg")


@pytest.mark.parametrize("dataset", ["cuhk", "icfg", "rstp"])
@pytest.mark.parametrize("prefix", ["", "imgs/"])       # the two release conventions
def test_processed_files(tmp_path, dataset, prefix):
    def one(name, caption, identity):
        return {"image": prefix + name, "caption": caption, "image_id": identity}
    touch(tmp_path / RAW[dataset][0] / "imgs", "a/1.jpg", "a/2.jpg", "a/3.jpg")
    write(tmp_path / f"finetune/{dataset}_train.json",
          [one("a/1.jpg", "x one", 5), one("a/2.jpg", "y", 2),
           one("a/1.jpg", "x two ", 5), one("a/2.jpg", "z", 2)])
    write(tmp_path / f"finetune/{dataset}_val.json", [one("a/3.jpg", ["v"], 9)])
    write(tmp_path / f"finetune/{dataset}_test.json",
          [one("a/3.jpg", ["t", "u"], 9), one("a/3.jpg", ["w"], 9)])
    lines = []
    train, test = (load(dataset, split, tmp_path, say=lines.append).records for split in ("train", "test"))
    assert [(r.captions, r.identity) for r in train] == [(("x one", "x two"), 0), (("y", "z"), 1)]
    assert [r.captions for r in test] == [("t", "u", "w")]
    assert len(lines) == 2 and f"{dataset}_train.json" in lines[0]
    benchmark(tmp_path, dataset, [raw_item(dataset, "a/1.jpg", 5, s) for s in ("train", "val")])
    assert load(dataset, "train", tmp_path, say=lines.append).records[0].captions == ("a man",)  # raw first
    assert RAW[dataset][1] in lines[-1]


def test_one_image_of_two_people_is_refused(tmp_path):
    touch(tmp_path / "RSTPReid", "1.jpg")
    write(tmp_path / "finetune/rstp_train.json",
          [{"image": "1.jpg", "caption": "a", "image_id": i} for i in (1, 2)])
    message = refusal("rstp", "train", tmp_path)
    assert "rstp_train.json" in message and "record 1 " in message and "1.jpg" in message


def test_sda_parts_in_alphabetical_order_with_boxes(tmp_path):
    boxes = [(0.5, 0.5, 1.0, 1.0), (0.2, 0.25, 0.4, 0.5005)]       # the second leaves the image by 0.00025
    for start in (0, 5000, 10000):
        write(tmp_path / f"SDA/sda_{start}_{start + 5000}.json",
              [sda_item(f"c/{start}_{i}.jpg", start + i, boxes, [" a man ", "a red hat"]) for i in range(4)])
        touch(tmp_path / "SDA", *(f"c/{start}_{i}.jpg" for i in range(4)))
    write(tmp_path / "SDA/sda_20000_25000.json", [sda_item("c/0_0.jpg", 20000)])
    write(tmp_path / "SDA/town.json", {"seed": 0})
    train = load("sda", "train", tmp_path, say=quiet).records
    val = load("sda", "val", tmp_path, say=quiet).records
    first, last = ([f"{start}_{i}.jpg" for start in starts for i in range(4)] for starts in ((0, 10000), (5000,)))
    order = [*first, "0_0.jpg", *last]
    for records_ in (train, val):
        kept = [Path(r.path).name for r in records_]
        assert kept == [name for name in order if name in kept]
    assert len(train) + len(val) == 13 and len(val) == 2
    full = next(r for r in train if r.boxes)
    assert full.phrases == ("a man", "a red hat") and full.boxes[0] == (0.5, 0.5, 1.0, 1.0)
    assert np.allclose(full.boxes[1], (0.2, 0.250125, 0.4, 0.50025))
    assert full.boxes[1][1] - full.boxes[1][3] / 2 >= 0
    assert any(r.boxes == r.phrases == () for r in (*train, *val))
    assert "sda_test.json" in refusal("sda", "test", tmp_path)
    write(tmp_path / "SDA/finetune/sda_test.json",
          [{"image": "c/0_1.jpg", "caption": ["a", "b"], "image_id": 1}])
    assert load("sda", "test", tmp_path, say=quiet).records[0].captions == ("a", "b")
    assert list(load("sda", "train", tmp_path, say=quiet).records) == list(train)


def test_mals_has_text_ids_and_no_boxes(tmp_path):
    touch(tmp_path / "MALS", *(f"g/{i}.jpg" for i in range(4)))
    for part in (0, 1):
        write(tmp_path / f"MALS/g_c_g_a_{part}_attrs.json", [
            {"image": f"g/{i}.jpg", "caption": "a girl", "image_id": f"c_g_a_{i}", "label": [1, 0, -1] * 9}
            for i in (2 * part, 2 * part + 1)])
    train, val = (load("mals", split, tmp_path, say=quiet).records for split in ("train", "val"))
    assert sorted(Path(r.path).name for r in (*train, *val)) == [f"{i}.jpg" for i in range(4)] and len(val) == 1
    assert [r.identity for r in train] == [0, 1, 2] and train[0].boxes == ()
    assert "mals" in refusal("mals", "test", tmp_path)


def test_own_set_in_finetune_format(tmp_path):
    touch(tmp_path / "mine", *(f"{i}.jpg" for i in range(6)))
    items = [{"image": f"{i}.jpg", "caption": "a man", "image_id": f"person {i % 3}"} for i in range(6)]
    write(tmp_path / "mine/train.json", items[:5])
    (tmp_path / "mine/._train.json").write_bytes(b"\0")          # left by some file managers
    folder = str(tmp_path / "mine")
    train, val = (load(folder, split, Path("nowhere"), say=quiet).records for split in ("train", "val"))
    assert {r.path for r in train}.isdisjoint(r.path for r in val) and len(train) + len(val) == 5 and val
    assert "test.json" in refusal(folder, "test", tmp_path)
    write(tmp_path / "mine/train.json", items[::3])
    assert "no record for the split val" in refusal(folder, "val", tmp_path)
    write(tmp_path / "mine/train.json", items[:5])
    write(tmp_path / "mine/val.json", items[5:])
    assert len(load(folder, "train", tmp_path, say=quiet).records) == 5
    assert load(folder, "val", tmp_path, say=quiet).records[0].path == f"{folder}/5.jpg"
    touch(tmp_path / "judge", "0.jpg")
    write(tmp_path / "judge/test.json", items[:1])               # is not taken for a part of train
    assert "train.json" in refusal(str(tmp_path / "judge"), "train", tmp_path)
    assert len(load(str(tmp_path / "judge"), "test", tmp_path, say=quiet).records) == 1


ALONE = [{"image": "1.jpg", "caption": [], "image_id": "b"},
         {"image": None, "caption": ["a hat", "a bag"], "image_id": 7},
         {"image": "0.jpg", "caption": "a man", "image_id": "a"},
         {"image": "", "caption": "a coat", "image_id": "a"}]


def test_images_and_captions_alone(tmp_path):
    """In val and test; records without an image stay apart, whoever they are of."""
    touch(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    write(tmp_path / "train.json", [{"image": "2.jpg", "caption": "a boy", "image_id": 3}] * 2)
    for split in ("val", "test"):
        write(tmp_path / f"{split}.json", ALONE)
        lines = []
        records = load(str(tmp_path), split, tmp_path, say=lines.append).records
        assert [(Path(r.path).name, r.captions, r.identity) for r in records] == [
            ("1.jpg", (), 0), ("", ("a hat", "a bag"), 1), ("0.jpg", ("a man",), 2), ("", ("a coat",), 2)]
        assert "2 images, 4 captions, 3 identities" in lines[0]
    os.remove(tmp_path / "1.jpg")
    assert "1 of 2 images are missing" in refusal(str(tmp_path), "test", tmp_path)
    kept = load(str(tmp_path), "test", tmp_path, allow_missing=True, say=quiet).records
    assert [r.captions for r in kept] == [("a hat", "a bag"), ("a man",), ("a coat",)]
    os.remove(tmp_path / "0.jpg")
    message = refusal(str(tmp_path), "test", tmp_path, allow_missing=True)
    assert f"2 of 2 images are missing in '{tmp_path}' and its folder imgs: " in message
    assert "--allow-missing" not in message         # which cannot help


def test_images_and_captions_alone_where_they_help_nobody(tmp_path):
    """In train, or held out of it as val; and where nothing of a split can be found."""
    touch(tmp_path, "0.jpg", "1.jpg")
    for bad, name in ((ALONE[0], "'1.jpg'"), (ALONE[1], "None"), (ALONE[3], "''")):
        write(tmp_path / "train.json", [ALONE[2], bad])
        for split in ("train", "val"):
            assert f"train.json', record 1 (the first is 0), image {name}: it needs an image and a caption" in refusal(
                str(tmp_path), split, tmp_path)
    write(tmp_path / "test.json", [ALONE[2], ALONE[1] | {"caption": []}])
    assert "record 1 " in refusal(str(tmp_path), "test", tmp_path)
    for useless in (ALONE[:2], ALONE[:1], ALONE[1:2]):
        write(tmp_path / "test.json", useless)
        assert "test.json': in the split test no caption is of a person with an image" in refusal(
            str(tmp_path), "test", tmp_path)


def test_a_set_with_images_and_captions_alone_is_trained_on_and_evaluated(root, monkeypatch, capsys):
    """Six images and eight captions of val and test: one of a person without an image, two more of no image."""
    images = [f"{person}_{view}.png" for person in range(3) for view in range(2)]
    items = {split: [{"image": f"CUHK-PEDES/imgs/{split}/{image}", "caption": "a man", "image_id": image[0]}
                     for image in images] for split in SPLITS}
    for split in ("val", "test"):
        items[split][0]["caption"] = []
        items[split] += [{"image": None, "caption": ["a coat", "a hat"], "image_id": "2"},
                         {"image": None, "caption": "a bag", "image_id": "nobody"}]
    for split in SPLITS:
        write(root / f"{split}.json", items[split])
    monkeypatch.chdir(root)
    common = ("--dataset", ".", "--device", "cpu")
    once = ("--preset", "tiny", "--init", "none", "--steps", "1", "--evals", "1", "--batch", "2", "--out", "out/one")
    for script, flags in ((train, once), (evaluate, ()), (evaluate, ("--query", "a coat"))):
        monkeypatch.setattr("sys.argv", [script.__name__ + ".py", *common, *flags])
        script.main()
    assert "1 of 8 queries are of people without an image, and are not counted." in capsys.readouterr().out
    results, = json.loads((root / "out/one/results.json").read_text())["results"].values()
    assert (results["queries"], results["gallery"], results["identities"]) == (8, 6, 3)
    assert len(json.loads((root / "out/one/query.json").read_text())["answers"][0]["first"]) == 6


def test_boxes_of_an_own_set_in_finetune_format(tmp_path):
    """One record a caption: the boxes of an image's records are joined, as its captions are."""
    touch(tmp_path, "1.png", "2.png")
    write(tmp_path / "train.json", [sda_item("1.png", 1, [(0.5, 0.5, 0.2, 0.2)], ["a bag"]),
                                    sda_item("1.png", 1, [(0.5, 0.5, 0.4, 0.4)], ["a coat"], "a lady"),
                                    {"image": "2.png", "caption": "a man", "image_id": 2}])
    write(tmp_path / "val.json", [{"image": "2.png", "caption": "a man", "image_id": 2}])
    first, second = load(str(tmp_path), "train", tmp_path, say=quiet).records
    assert first.phrases == ("a bag", "a coat") and first.boxes[1][2] == pytest.approx(0.4) and second.boxes == ()
    assert first.captions == ("a woman", "a lady")


def test_boxes_are_clipped_to_the_image(tmp_path):
    """Detectors predict centre and size, which overshoots at the edges."""
    given = [(0.5, 0.5, 1.004, 0.9), (0.9, 0.1, 0.4, 0.4), (0.5, 0.5, 0.5, 0.5), (0.2, 0.25, 0.4, 0.5005)]
    kept = [(0.5, 0.5, 1.0, 0.9), (0.85, 0.15, 0.3, 0.3), (0.5, 0.5, 0.5, 0.5), (0.2, 0.250125, 0.4, 0.50025)]
    touch(tmp_path, "1.png")
    write(tmp_path / "train.json", [sda_item("1.png", 1, [box], ["a bag"]) for box in given])
    row, = read.read_rows(locate(str(tmp_path), "train", tmp_path))[0]
    assert np.allclose(row.record.boxes, kept) and row.record.boxes[2] == given[2]


def test_own_set_in_sda_format(tmp_path):
    touch(tmp_path / "mine/imgs", "1.png", "2.png")
    write(tmp_path / "mine/sda_2.json", [sda_item("2.png", 4)])
    write(tmp_path / "mine/sda_10.json", [sda_item("1.png", 2, [(0.5, 0.5, 0.2, 0.2)], ["a bag"])])
    both = [load(str(tmp_path / "mine"), split, tmp_path, say=quiet).records for split in ("train", "val")]
    assert sorted(len(r.boxes) for records_ in both for r in records_) == [0, 1]
    assert "no test split" in refusal(str(tmp_path / "mine"), "test", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "'" + str(tmp_path / "empty") in refusal(str(tmp_path / "empty"), "train", tmp_path)
    assert "icfg" in refusal("cuhkk", "train", tmp_path)


def test_the_val_split_that_is_held_out(tmp_path):
    items = [raw_item("icfg", f"{i // 20}.jpg", i // 20 * 10, "train") for i in range(12000)]
    names = [f"{i}.jpg" for i in range(600)]            # 600 people, each 20 times in one image
    benchmark(tmp_path, "icfg", [*items, raw_item("icfg", "0.jpg", 99999, "test")], images=names)
    lines = []
    sets = {split: load("icfg", split, tmp_path, say=lines.append).records for split in SPLITS}
    people = {split: {Path(r.path).stem for r in sets[split]} for split in ("train", "val")}
    assert people["train"].isdisjoint(people["val"]) and len(people["train"] | people["val"]) == 600
    assert len(people["val"]) == 50 and len(sets["val"]) == 1000        # a tenth would be 60 people
    assert len(sets["train"]) == 11000 and len(sets["test"]) == 1
    assert sum("held out as val" in line for line in lines) == 2
    benchmark(tmp_path, "icfg", items[::-1], images=[])                 # neither order nor a loss changes it
    os.remove(sets["train"][0].path)
    assert {r.path for r in load("icfg", "val", tmp_path, say=quiet).records} == {r.path for r in sets["val"]}
    os.remove(sets["val"][0].path)
    left = load("icfg", "val", tmp_path, allow_missing=True, say=quiet).records
    assert {r.path for r in left} == {r.path for r in sets["val"]} - {sets["val"][0].path}


# ---- what is refused ------------------------------------------------------------------------------

GOOD = sda_item("ok.jpg", 1, [(0.5, 0.5, 0.5, 0.5)], ["a man"])


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


BAD = {
    "not an object": ["image"], "null": None,
    "no image": without("image"), "image is a number": GOOD | {"image": 3},
    "no caption": without("caption"), "caption is null": GOOD | {"caption": None},
    "caption empty": GOOD | {"caption": ""}, "caption of signs": GOOD | {"caption": " ...\n\t!"},
    "captions none": GOOD | {"caption": []}, "captions mixed": GOOD | {"caption": ["a man", 5]},
    "no id": without("image_id"), "id is null": GOOD | {"image_id": None},
    "id is NaN": GOOD | {"image_id": float("nan")}, "id is true": GOOD | {"image_id": True},
    "no boxes": without("boxes"), "boxes is text": GOOD | {"boxes": "all"},
    "no phrases": without("phrases"), "phrase empty": GOOD | {"phrases": [" "]},
    "phrase is a number": GOOD | {"phrases": [1]}, "fewer phrases": GOOD | {"phrases": []},
    "box of three": GOOD | {"boxes": [[0.5, 0.5, 0.5]]}, "box of text": GOOD | {"boxes": [["0.5"] * 4]},
    "box NaN": GOOD | {"boxes": [[0.5, float("nan"), 0.5, 0.5]]},
    "box inf": GOOD | {"boxes": [[0.5, 0.5, float("inf"), 1]]},
    "box true": GOOD | {"boxes": [[True] * 4]}, "box huge": GOOD | {"boxes": [[10**400, 0.5, 0.5, 0.5]]},
    "box in pixels": GOOD | {"boxes": [[48, 96, 20, 40]]},
    "box beside": GOOD | {"boxes": [[1.5, 0.5, 0.5, 0.5]]}, "box above": GOOD | {"boxes": [[0.5, -1, 0.5, 0.7]]},
    "box empty": GOOD | {"boxes": [[0.5, 0.5, 0, 0.5]]},
    "box negative": GOOD | {"boxes": [[0.5, 0.5, 0.2, -0.1]]},
    "box a sliver outside": GOOD | {"boxes": [[-0.0005, 0.5, 0.0004, 0.5]]},
    "path up": GOOD | {"image": "../ok.jpg"}, "path up inside": GOOD | {"image": "a/../../ok.jpg"},
    "path absolute": GOOD | {"image": "/etc/passwd"}, "path root": GOOD | {"image": "/ok.jpg"},
    "path backslash": GOOD | {"image": "..\\ok.jpg"}, "path empty": GOOD | {"image": ""},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_record_is_named(tmp_path, bad):
    touch(tmp_path / "SDA", "ok.jpg")
    file = write(tmp_path / "SDA/sda_0_5000.json", [GOOD, GOOD, bad])
    message = refusal("sda", "train", tmp_path, allow_missing=True)
    assert message.startswith(f"'{file}', record 2 (the first is 0), image ")
    if isinstance(bad, dict) and "image" in bad:
        assert f"image {bad['image']!r}: " in message


@pytest.mark.parametrize("split", ["dev", "Train", "", "query", None, 3])
def test_other_splits_are_not_mapped(tmp_path, split):
    items = [raw_item("rstp", "1.jpg", 1, "train"), raw_item("rstp", "2.jpg", 1, split)]
    benchmark(tmp_path, "rstp", items)
    message = refusal("rstp", "train", tmp_path)
    assert "data_captions.json', record 1 " in message and repr(split) in message


def test_faults_come_in_the_order_of_the_files(tmp_path):
    for part in range(3):
        write(tmp_path / f"SDA/sda_{part}_{part + 1}.json", [sda_item(f"{part}.jpg", part)] * 2)
    touch(tmp_path / "SDA", *(f"{part}.jpg" for part in range(3)))
    away = {"image": "../9.jpg", "caption": "a", "image_id": 9, "boxes": [], "phrases": []}
    write(tmp_path / "SDA/sda_10_11.json", [away, {"image": "9.jpg"}])
    write(tmp_path / "SDA/sda_12_13.json", {"no": "list"})
    rows, found = read.read_rows(locate("sda", "train", tmp_path))
    assert len(rows) == 6
    assert ["leads out" in found[0], "record 1" in found[1], "must hold a list" in found[2]] == [True] * 3 == [
        "sda_10_11" in found[0], "sda_10_11" in found[1], "sda_12_13" in found[2]]


def test_a_share_keeps_whole_identities_and_grows_by_adding():
    whole = RecordSet("own", "train", tuple(Record(str(i), ("a man",), i // 3) for i in range(60)))
    tenth, half, everything = (share_of(whole, share) for share in (0.1, 0.5, 1.0))
    paths = [{record.path for record in some.records} for some in (tenth, half, everything)]
    assert [len(some) for some in paths] == [6, 30, 60] and paths[0] < paths[1] < paths[2]
    assert sorted({record.identity for record in half.records}) == list(range(10)) and everything == whole


@pytest.mark.parametrize("content", ["", '[{"image": "a', "{}", "[]", "3", "\0", "[1" + "0" * 5000,
                                     "[" * 100000, '{"a": ' * 100000], ids=range(9))
def test_a_file_that_is_no_list(tmp_path, content):
    touch(tmp_path / "SDA", "ok.jpg")
    file = write(tmp_path / "SDA/sda_0_5000.json", content)
    assert f"'{file}'" in refusal("sda", "train", tmp_path)
    file.write_bytes(b"\xff\xfe[\xd8")
    assert f"'{file}'" in refusal("sda", "train", tmp_path)
    file.unlink()
    file.mkdir()
    assert f"'{file}'" in refusal("sda", "train", tmp_path)


def test_missing_files_and_folders(tmp_path):
    assert str(tmp_path / "CUHK-PEDES") in refusal("cuhk", "train", tmp_path)
    (tmp_path / "CUHK-PEDES").mkdir()
    message = refusal("cuhk", "test", tmp_path)
    assert "CUHK-PEDES/reid_raw.json" in message and "finetune/cuhk_test.json" in message
    assert "caption_all" not in message
    write(tmp_path / "CUHK-PEDES/caption_all.json", [])
    assert "caption_all.json" in refusal("cuhk", "test", tmp_path)
    message = refusal("cuhk", "test", tmp_path)
    assert "caption_all.json is there but names no splits" in message
    (tmp_path / "CUHK-PEDES/caption_all.json").unlink()
    write(tmp_path / "finetune/cuhk_train.json", [{"image": "1.jpg", "caption": "a", "image_id": 1}])
    assert "cuhk_val.json" in refusal("cuhk", "val", tmp_path)                 # never made from train
    benchmark(tmp_path, "cuhk", [raw_item("cuhk", "1.jpg", 1, "train")])
    assert "reid_raw.json' has no record" in refusal("cuhk", "val", tmp_path)


def test_missing_images_are_counted_and_five_are_named(tmp_path):
    items = [raw_item("cuhk", f"cam_{i % 2}/{i}.jpg", i, "train") for i in range(20)]
    items += [raw_item("cuhk", "v.jpg", 5, "val")]
    benchmark(tmp_path, "cuhk", items, images=[f"cam_1/{i}.jpg" for i in range(1, 20, 2)])
    (tmp_path / "CUHK-PEDES/imgs/cam_0/4.jpg").mkdir(parents=True)             # a folder is no image
    message = refusal("cuhk", "train", tmp_path)
    assert "--allow-missing of train.py and evaluate.py drops some" in message
    assert "10 of 20 images are missing" in message and message.count("record") == 5
    for i in (0, 2, 4, 6, 8):
        assert f"reid_raw.json', record {i} (the first is 0), image 'cam_0/{i}.jpg'" in message
    lines = []
    kept = load("cuhk", "train", tmp_path, allow_missing=True, say=lines.append).records
    assert [r.identity for r in kept] == list(range(10)) and "10 of 20 images" in lines[0]
    assert [Path(r.path).stem for r in kept] == [str(i) for i in range(1, 20, 2)]
    assert "1 of 1 images" in refusal("cuhk", "val", tmp_path, allow_missing=True)


@pytest.mark.parametrize("name", ["a\0b/1.jpg", "\ud800/1.jpg", "x" * 5000 + "/1.jpg", "\x1b[2J.jpg", ".",
                                  "a/", "a"], ids=range(7))
def test_names_that_no_disk_holds_are_missing(tmp_path, name):
    touch(tmp_path / "SDA", "ok.jpg", "a/1.jpg")
    write(tmp_path / "SDA/sda_0_5000.json", [GOOD | {"image": name, "image_id": i} for i in (1, 2)])
    assert "1 of 1 images are missing" in refusal("sda", "train", tmp_path)


def test_links_to_images_and_folders(tmp_path):
    """They are the user's own: followed wherever they lead. A broken one is a missing image."""
    touch(tmp_path / "elsewhere", "1.jpg")
    sda = tmp_path / "SDA"
    sda.mkdir()
    for link, target in {"file.jpg": tmp_path / "elsewhere/1.jpg", "folder": tmp_path / "elsewhere",
                         "broken.jpg": sda / "none", "loop": sda / "loop"}.items():
        (sda / link).symlink_to(target)
    for name in ("broken.jpg", "loop/1.jpg", "loop"):
        write(sda / "sda_0_1.json", [sda_item(name, i) for i in range(3)])
        assert "images are missing" in refusal("sda", "train", tmp_path)
    for name in ("file.jpg", "folder/1.jpg"):
        write(sda / "sda_0_1.json", [sda_item(name, i) for i in range(3)])
        assert load("sda", "train", tmp_path, say=quiet).records[0].path == f"{sda}/{name}"


def test_image_folders_on_another_disk(tmp_path):
    """A folder imgs that is itself a link is the user's choice, and the record names either level."""
    touch(tmp_path / "disk", "1.jpg", "2.jpg")
    (tmp_path / "RSTPReid").mkdir()
    (tmp_path / "RSTPReid/imgs").symlink_to(tmp_path / "disk")
    items = [raw_item("rstp", name, 0, "test") for name in ("1.jpg", "imgs/2.jpg")]
    benchmark(tmp_path, "rstp", items, images=[])
    paths = [r.path for r in load("rstp", "test", tmp_path, say=quiet).records]
    assert paths == [f"{tmp_path}/RSTPReid/imgs/{i}.jpg" for i in (1, 2)]


def test_shown_is_safe_for_a_terminal():
    assert quoted("a\x1b[31m\n\u202e\ud800") == r"'a\x1b[31m\n\u202e\ud800'"
    assert len(quoted("x" * 1000)) < 90 and quoted("x" * 1000).endswith("...")
    assert str(Path("y" * 200)) in quoted(Path("y" * 200))
    nested = []
    for _ in range(100000):
        nested = [nested]
    assert len(quoted(nested)) < 90


def test_folders_are_listed_once_and_images_not_asked_for(tmp_path, monkeypatch):
    """On a network disk a million questions take hours."""
    items = [raw_item("rstp", f"c{i % 3}/{i}.jpg", i, "test") for i in range(600)]
    benchmark(tmp_path, "rstp", items)
    asked = []
    for name in ("scandir", "stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, do=real, kind=name, **k: asked.append(kind) or do(*a, **k))
    assert len(load("rstp", "test", tmp_path, say=quiet).records) == 600
    assert 3 <= asked.count("scandir") <= 10 and len(asked) < 150


# ---- pictures -------------------------------------------------------------------------------------

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels(path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_greyscale_palette_and_bilevel(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "l.png")
    assert pixels(tmp_path / "l.png").tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert pixels(tmp_path / "p.png").tolist() == [[list(RED), list(BLUE)]]
    palette.save(tmp_path / "t.png", transparency=0)
    palette.save(tmp_path / "t.gif", transparency=0)
    palette.save(tmp_path / "b.png", transparency=b"\x00\xff")
    for name in ("t.png", "t.gif", "b.png"):
        assert pixels(tmp_path / name).tolist() == [[[255] * 3, list(BLUE)]]
    Image.new("1", (3, 1), 1).save(tmp_path / "1.png")
    assert pixels(tmp_path / "1.png").tolist() == [[[255] * 3] * 3]


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 255, 128))
    image.save(tmp_path / "a.png")
    got = pixels(tmp_path / "a.png")
    assert np.abs(got - [[RED, (255, 255, 255), (127, 127, 255)]]).max() <= 1
    image.convert("LA").save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0, 1].tolist() == [255] * 3
    Image.new("RGB", (1, 1), RED).save(tmp_path / "key.png", transparency=RED)  # red means "nothing"
    assert pixels(tmp_path / "key.png").tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind, name", [(np.uint16, "g.png"), (np.uint16, "g.tif"), (np.int32, "i.tif"),
                                        (np.float32, "f.tif")])
def test_more_than_eight_bits_a_channel_are_refused(tmp_path, kind, name):
    Image.fromarray(np.array([[0, 1]], kind)).save(tmp_path / name)
    with pytest.raises(UserError, match="more than 8 bits"):
        pixels(tmp_path / name)


def test_cmyk(tmp_path):
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))        # no cyan, all magenta and yellow: red
    ink.save(tmp_path / "c.jpg", quality=100)
    ink.save(tmp_path / "c.tif")
    for name in ("c.jpg", "c.tif"):
        assert np.abs(pixels(tmp_path / name) - RED).max() <= 4


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_the_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=10, **options)
    assert (pixels(tmp_path / name) == RED).all()


@pytest.mark.parametrize("name", ["e.jpg", "e.png", "e.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, name):
    """Each orientation undoes the turn that was done to a picture with one bright corner."""
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:8, :8] = 255                                       # top left
    undone = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
              8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undone)).save(tmp_path / name, exif=exif, quality=100)
    assert np.abs(pixels(tmp_path / name) - upright).max() <= 8


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("size", [(10000, 5001), (10000, 10000), (60000, 60000)])  # Pillow warns of two
def test_decompression_bombs_are_refused_before_decoding(tmp_path, size, monkeypatch, recwarn):
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(png_header(*size) + body)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match="bomb.png' cannot be read: .*pixels"):
        open_image(tmp_path / "bomb.png")
    assert not recwarn.list and files.PIXEL_LIMIT == 50_000_000


def test_what_does_not_decode_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    Image.open(tmp_path / "whole.png").save(tmp_path / "whole.jpg")
    whole = {name: (tmp_path / name).read_bytes() for name in ("whole.png", "whole.jpg")}
    broken = {"empty.jpg": b"", "text.jpg": b"<html>404</html>",
              "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
              "cut.png": whole["whole.png"][:5000], "cut.jpg": whole["whole.jpg"][:1000],
              "start.jpg": whole["whole.jpg"][:20],
              "header.png": png_header(9, 9), "bad\x1b.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 50}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_image(str(tmp_path / name))
        assert quoted(tmp_path / name) in str(caught.value) and str(caught.value).isprintable()
    Image.new("RGB", (9, 9)).save(tmp_path / "sound.pcx")                   # formats nobody needs stay closed
    with pytest.raises(UserError, match="sound.pcx"):
        open_image(tmp_path / "sound.pcx")
    with pytest.raises(UserError, match="gone.jpg"):
        open_image(tmp_path / "gone.jpg")


def test_a_broken_orientation_note_does_not_lose_the_picture(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "x.png", exif=b"Exif\0\0nonsense")
    assert (pixels(tmp_path / "x.png") == RED).all()
