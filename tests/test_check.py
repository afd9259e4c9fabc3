"""`train.py --check` against small sets spoilt by hand, each trouble found, counted and named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from mra.config import UserError
from mra.data.tokenizer import VOCAB_FILE
from mra.formats import check
from mra.group import Group
from mra.run.command import run
from mra.run.machine import Machine

COUNTS = {split: (3, 6, 12) for split in ("train", "val", "test")}    # of the fixture `root`


@pytest.fixture
def checked(root, monkeypatch, capsys):
    """Run `train.py --check` on the fixture's CUHK-PEDES, as if that were the published one: status, output."""
    monkeypatch.setitem(check.PUBLISHED, "cuhk", COUNTS)
    monkeypatch.chdir(root)

    def go(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["train.py", "--check", *(flags or ("--dataset", "cuhk", "--data-root", "."))])
        with pytest.raises(SystemExit) as end:
            run(train.main)
        said = capsys.readouterr()
        assert not (root / "out").exists() and (said.err == "") == (end.value.code < 2), said.err
        return end.value.code, said.out + said.err
    return go


@pytest.fixture
def note(root, tokenizer):
    """Check the fixture's CUHK-PEDES: the one line of output that holds `words`; a note does not make a set unwell."""
    def go(words: str) -> str:
        lines = []
        assert check.check_set("cuhk", root, tokenizer, 56, 1, lines.append) and lines[-1] == "No faults found."
        line, = (line for line in lines if words in line)
        return line
    return go


def records_of(root: Path, change) -> None:
    """Change the records of the annotation file in place, by a function of the list."""
    file = root / "CUHK-PEDES/reid_raw.json"
    items = json.loads(file.read_text())
    change(items)
    file.write_text(json.dumps(items))


def test_published_counts():
    """The benchmark's own totals: 40,206 images, 80,440 captions and 13,003 people; 54,522; 20,505 and 41,010."""
    totals = {name: [sum(row) for row in zip(*splits.values())] for name, splits in check.PUBLISHED.items()}
    assert totals == {"cuhk": [13_003, 40_206, 80_440], "icfg": [4_102, 54_522, 54_522],
                      "rstp": [4_101, 20_505, 41_010]}


def test_a_whole_set(checked, root):
    status, out = checked()
    assert status == 0 and out.endswith("No faults found.\n") and "Note" not in out
    for split in ("train", "val", "test"):
        assert f"{split}: 3 identities, 6 images, 12 captions; published 3, 6 and 12\n" in out


def test_everything_that_is_wrong_is_listed_at_once(checked, root):
    imgs = root / "CUHK-PEDES/imgs"
    (imgs / "train/0_0.png").unlink()
    shutil.rmtree(imgs / "val")
    (imgs / "train/1_1.png").write_bytes((imgs / "train/1_1.png").read_bytes()[:200])

    def spoil(items):
        items[3]["captions"][1] = " "                       # train 1_1
        items[5]["captions"] = ["a man", "a woman", "he"]    # train 2_1: three
        items[12]["file_path"] = "train/0_1.png"            # was test 0_0
        items[13]["id"] = None                              # test 0_1
        items[14]["captions"] = ["穿红衣", "if (x) { return; } 穿"]
        items[15]["split"] = "query"
        items[16]["file_path"] = items[17]["file_path"]
    records_of(root, spoil)
    status, out = checked()
    assert status == 1 and out.endswith("Faults found: see above.\n")
    for line in ("3 x unusable,", "7 x missing image,", "2 x image that has two records,"):
        assert f"Fault: {line} such as\n  " in out
    for number, words in ((3, "a caption is empty or not text: ' '"), (13, "the field 'id' has the wrong type"),
                          (15, "unknown split 'query'"), (0, "image 'train/0_0.png'"), (12, "also in train, "),
                          (12, "record 1 ("), (17, "also in test, "), (17, "record 16 (")):
        assert any(f"record {number} (" in line and words in line for line in out.splitlines()), words
    train_counts = "train: 3 identities, 5 images, 11 captions; published 3, 6 and 12\n"
    assert out.count(train_counts) == 1 and "\ntest: 3 identities, 4 images, 8 captions; published 3, 6 and 12\n" in out


def test_a_part_of_a_benchmark_is_well(checked, root):
    records_of(root, lambda items: items.__delitem__(slice(1, 6)))          # train keeps one image
    status, out = checked()
    assert status == 0 and out.endswith("No faults found.\n")
    assert "\ntrain: 1 identities, 1 images, 2 captions; published 3, 6 and 12\n" in out


@pytest.mark.parametrize("size, odd", [((15, 40), True), ((40, 15), True), ((16, 16), False), ((16, 96), False),
                                       ((16, 97), True), ((97, 16), True)])
def test_tiny_and_narrow_images_are_noted(root, note, size, odd):
    Image.new("RGB", size).save(root / "CUHK-PEDES/imgs/val/0_0.png")
    if not odd:
        with pytest.raises(ValueError):
            note("image under")
        return
    assert note("image under") == ("Note: 1 x image under 16 pixels a side or of an aspect beyond 1:6, such as\n  "
                                   f"'{root}/CUHK-PEDES/imgs/val/0_0.png', {size[0]} x {size[1]}")


def test_captions_that_the_model_cuts_are_noted(root, note):
    """Of 56 ids two are [CLS] and [SEP]; "xq" is two pieces of the packaged vocabulary."""
    def spoil(items):
        items[7]["captions"] = ["a " * 54, "a " * 53 + "xq", "a " * 300]
    records_of(root, spoil)
    line = note("model cuts")
    vocabulary = f"the vocabulary '{VOCAB_FILE}'"
    assert line.startswith(f"Note: 2 x caption of more than 54 pieces of {vocabulary}, which the model cuts, such as\n")
    assert "record 7 (" in line and "'a a a" in line


def test_all_cores_decode_unless_more_processes_are_asked_for(checked, monkeypatch):
    """The recipes of training have a number of processes of their own."""
    seen, machine = [], Machine(torch.device("cpu"), "float32", Group(), cores=6)
    monkeypatch.setattr(train, "check_set", lambda *given: seen.append(given[4]) or True)
    monkeypatch.setattr(Machine, "of", lambda *given: machine)
    for flags in (("--preset", "demo"), ("--preset", "small"), ("--workers", "0"), ("--workers", "7")):
        checked("--dataset", "cuhk", "--data-root", ".", *flags)
    assert seen == [6, 8, 6, 7]


def test_words_that_the_vocabulary_lacks_are_noted(checked, root, note):
    def spoil(items):
        items[2]["captions"] = ["a man 穿 in a [UNK] café", "a man 红 and ☂, 穿"]
    records_of(root, spoil)
    line = note("caption with words")
    assert line.startswith(f"Note: 2 x caption with words that the vocabulary '{VOCAB_FILE}' lacks, such as\n  '")
    assert "record 2 (" in line and line.endswith("'a man 穿 in a [UNK] café'")


def test_images_that_do_not_decode(checked, root):
    imgs = root / "CUHK-PEDES/imgs"
    for number in range(3):
        (imgs / f"train/{number}_0.png").write_bytes((imgs / f"train/{number}_0.png").read_bytes()[:200])
    (imgs / "test/0_0.png").write_bytes(b"<html>404</html>")
    status, out = checked()
    assert status == 1 and "4 x image that does not decode," in out
    assert all(f"{name}' cannot be read" in out for name in ("train/0_0.png", "train/2_0.png", "test/0_0.png"))


def test_many_images_are_decoded_by_several_processes(tmp_path, paint, tokenizer):
    items = [{"image": f"{number}.png", "caption": f"a {number}", "image_id": number} for number in range(82)]
    paths = [Path(paint(item["image"])) for item in items]
    for path in (paths[3], paths[81]):
        path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "train.json").write_text(json.dumps(items))
    told = {}
    for workers in (1, 2):
        lines = told[workers] = []
        assert not check.check_set(str(tmp_path), tmp_path, tokenizer, 56, workers, lines.append)
        assert "  82 of 82 images decoded" in lines
        line, = (line for line in lines if line.startswith("Fault: 2 x image that does not decode"))
        assert line.index("/3.png") < line.index("/81.png")
    assert told[1] == told[2]


def test_a_cut_file_a_lost_split_and_a_lost_set(checked, root):
    records_of(root, lambda items: items.__delitem__(slice(6, 12)))
    status, out = checked()
    assert status == 1 and "1 x empty split, such as\n  val: 0 identities, 0 images, " in out
    file = root / "CUHK-PEDES/reid_raw.json"
    file.write_text(file.read_text()[:-20])
    status, out = checked()
    assert status == 2 and "is it cut short" in out
    file.rename(file.with_name("caption_all.json"))
    status, out = checked()
    assert status == 2 and "caption_all.json is there" in out
    assert "'elsewhere/CUHK-PEDES'" in checked("--dataset", "cuhk", "--data-root", "elsewhere")[1]


def test_a_set_of_ones_own_needs_no_val_and_no_test(checked, root):
    for number in range(70):
        (root / "mine").mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / f"mine/{number}.png")
    items = [{"image": f"{n}.png", "caption": "穿红衣", "image_id": n} for n in range(70)]
    (root / "mine/train.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    status, out = checked("--dataset", "mine")
    assert status == 0 and "Note: 1 x split without a file, such as\n  'mine' has no test split" in out
    assert "Note: 70 x caption with words that the vocabulary" in out and "published" not in out
    (root / "mine/test.json").write_text("[")
    assert checked("--dataset", "mine")[0] == 1


def test_distractors_and_queries_without_an_image_are_counted(checked, root):
    """Three images without a caption; two records without an image, of three captions. Neither is a fault."""
    images = [f"CUHK-PEDES/imgs/test/{person}_{view}.png" for person in range(3) for view in range(2)]
    items = [{"image": image, "caption": [], "image_id": number} for number, image in enumerate(images[:3])]
    items += [{"image": image, "caption": f"a man {image[-7]}", "image_id": image[-7]} for image in images[3:]]
    items += [{"image": None, "caption": ["a hat", "a bag"], "image_id": "1"},
              {"image": "", "caption": "a coat", "image_id": 9}]
    (root / "test.json").write_text(json.dumps(items))
    status, out = checked("--dataset", ".")
    assert status == 0 and "test: 4 identities, 6 images, 6 captions\n" in out
    assert "\ntest: 3 of these images are distractors, 3 of these captions have no image\n" in out
    assert "6 of 6 images decoded" in out
    (root / "test.json").write_text(json.dumps(items[3:6]))
    status, out = checked("--dataset", ".")
    assert status == 0 and "of these" not in out
    (root / "test.json").write_text(json.dumps(items[:3]))
    status, out = checked("--dataset", ".")
    assert status == 1 and "Fault: 1 x split in which no caption is of a person with an image, such as\n  test: " in out
    (root / "test.json").rename(root / "train.json").write_text(json.dumps(items))
    status, out = checked("--dataset", ".")
    assert status == 1 and "Fault: 5 x unusable" in out and "of these" not in out


def test_drawn_data_is_not_held_against_the_published_counts(checked, root):
    (root / "CUHK-PEDES/town.json").write_text("{}")
    records_of(root, lambda items: items.pop())
    status, out = checked()
    assert status == 0 and "drawn data, not photographs" in out and "5 images" in out


def test_a_set_that_is_not_there(root, tokenizer):
    with pytest.raises(UserError, match="no folder"):
        check.check_set("icfg", root, tokenizer, 56, 1)
