"""What DaD does around its networks: prompts, filters, boxes, what is kept, and adapt.py itself."""

import contextlib
import json
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Fresh, free_port, script
from safetensors.torch import load_file
from test_commands import command, succeed

from adapt import main as adapt_main
from mra.config import DAD_RECIPES, DIFFUSION_PRESETS, AdaptConfig
from mra.data.records import Record
from mra.data.tokenizer import Tokenizer
from mra.data.words import noun_phrases
from mra.diffusion.base import Diffusion
from mra.diffusion.filters import DAMAGE, Judge, distort, judge_loss, margins, scores_of, split_for_judge
from mra.diffusion.plan import average_boxes, content_of, drafts_of, record_of
from mra.diffusion.prompts import VARIANTS, prompts_of, stays_whole, variant
from mra.diffusion.sampling import transfer_moments
from mra.formats.read import load
from mra.run import networks, parts
from mra.run.checkpoint import digest_of
from mra.run.loop import Loop, Task
from mra.run.machine import Machine
from mra.show.gallery import photographs
from mra.town import sets

ROOT = Path(__file__).parents[1]
CAPTION = ("a slim woman with long blond hair wears a red jacket, black jeans and white sneakers. "
           "she has a green handbag.")


# ---- prompts

def test_prompts_take_turns_and_stay_true():
    rng = random.Random(0)
    assert variant(CAPTION, 0, rng) == CAPTION
    for number in range(1, VARIANTS + 1):
        prompt = variant(CAPTION, number, rng)
        assert "slim" in prompt or "slender" in prompt or "thin" in prompt       # who it is stays
        if number % 4 in (2, 3):                                                # phrases move or go, whole
            assert set(prompt.split(", ")) <= set(noun_phrases(CAPTION))
        for garment, colour in (("jeans", "black"), ("sneakers", "white"), ("handbag", "green")):
            words = prompt.replace(",", "").replace(".", "").split()
            assert garment not in words or words[words.index(garment) - 1] == colour
    assert {len(variant(CAPTION, 3, rng).split(", ")) for _ in range(30)} > {3, 4}


@pytest.mark.parametrize("caption, person", [
    ("The man is wearing a blue shirt, black pants and white shoes.", "man"),
    ("In blue jeans and a red top, a lady walks on.", "a lady walks"),
    ("She is wearing a red top and her shoes are white boots.", "a woman"),
    ("He has a black bag and wears a green coat.", "a man"), ("A red top, a black bag.", "a person"),
    ("She wears a men's shirt and blue jeans.", "a woman")])
def test_a_prompt_of_phrases_begins_with_the_person(caption, person):
    for number in (2, 3):
        assert variant(caption, number, random.Random(0)).split(", ")[0] == person


def test_a_prompt_of_phrases_names_the_person_once_and_tears_no_colour_off():
    caption = ("The man is wearing a long coat that is brown above and blue below and black pants. The man has short "
               "hair. The man is carrying a bag.")
    assert sorted(variant(caption, 2, random.Random(0)).split(", ")) == ["a bag", "a long coat", "black pants", "man",
                                                                          "short hair"]


def test_two_people_keep_their_clothes():
    caption = "A man in a red hat and a woman with a black and white dress and an umbrella."
    right = {f"A {man} in a red hat and a lady with a black and white dress and an umbrella."
             for man in ("guy", "gentleman")}
    assert {variant(caption, number, random.Random(number)) for number in range(1, VARIANTS + 1)} == right


@pytest.mark.parametrize("caption", [
    "The man in the red hat walks, and the woman has a green dress.", "She wears a man's coat and blue jeans.",
    "A man with a boy on his shoulders wears a green top.", "The person in blue walks behind the person in grey.",
    "A lady and the child beside her, in white shoes.", "A man (left) in blue; a man (right) in red, a black bag.",
    "Two men in dark suits.", "A women in a pink dress.", "A woman walks with another, both in skirts.",
    "A guy with his girlfriend, in a grey top.", "One wears a yellow coat, the other wears a grey hoodie.",
    "A lady pushes a baby carriage.", "the kid s father wears a black coat", "An elderly couple in coats.",
    "The boy is not wearing a hat.", "A man without a bag.", "the guy doesn t have a backpack", "He isnt in a coat."])
def test_a_caption_of_two_people_or_of_what_is_missing_is_not_taken_apart(caption):
    assert stays_whole(caption)


@pytest.mark.parametrize("caption", [
    CAPTION, "The man has short hair. The man wears a black coat, and the man carries a bag in the other hand.",
    "A left-handed man in his 20s with the number 23 on a white t shirt.", "A lady in women's shoes, women s jeans.",
    "This is a young male pedestrian. He has a couple of bags.", "A girl in a baby blue top, wearing one black boot.",
    "A man ina blue shrit and balck pants, carying a bagpack.", "A woman with a brown bag and a hat that is red."])
def test_a_caption_of_one_person_is_taken_apart(caption):
    assert not stays_whole(caption)


def test_prompts_visit_every_caption_before_any_twice():
    captions = [f"{CAPTION} {i}" for i in range(7)]
    made = prompts_of(captions, 17, seed=1)
    assert len(made) == 17 and {i for i, _ in made[:7]} == set(range(7)) == {i for i, _ in made[7:14]}
    assert [prompt for _, prompt in made[:7]] == [captions[i] for i, _ in made[:7]]
    assert made == prompts_of(captions, 17, seed=1) != prompts_of(captions, 17, seed=2)
    assert len(prompts_of(captions, 1000, seed=1)) == 7 * (VARIANTS + 1)


# ---- filters

def test_near_greyscale_images_have_no_colour():
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8).expand(2, 3, 8, 8)
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    judge = SimpleNamespace(score=lambda images: torch.arange(len(images)) / 10)
    scores = scores_of(torch.cat([grey, red]), judge)
    assert scores["malformed"].tolist() == pytest.approx([0, 0.1, 0.2])
    mean, variance = scores["colour_mean"], scores["colour_variance"]
    assert mean[:2].max() == variance[:2].max() == 0
    assert mean[2] == pytest.approx(2 / 3) and variance[2] == pytest.approx(2 / 9, rel=0.01)


def test_each_filter_has_its_threshold():
    config = AdaptConfig(grey_mean=0.1, grey_variance=0.1, malformed=0.25)
    good = {"colour_mean": 0.2, "colour_variance": 0.0, "malformed": 0.75}       # a quarter of the whole ones are worse
    assert margins(config, good) == pytest.approx({"greyscale": 0.1, "malformed": 0})
    for name, change in (("greyscale", {"colour_mean": 0.05}), ("malformed", {"malformed": 0.8})):
        assert [filter for filter, margin in margins(config, good | change).items() if margin < 0] == [name]
    assert margins(replace(config, malformed=0), {**good, "malformed": 1.0})["malformed"] >= 0      # 0: all are kept


def test_the_picture_shows_both_sides_of_each_threshold(tmp_path, monkeypatch):
    """Image i has grey level i and a score of i / 100, so 80 to 99 are dropped at a threshold of 0.2."""
    rows, shown = [], {}
    (tmp_path / "imgs").mkdir()
    (tmp_path / "parts").mkdir()
    for i in random.Random(0).sample(range(100), 100):
        Image.new("RGB", (16, 32), (i, i, i)).save(tmp_path / f"imgs/{i}.png")
        rows.append({"image": f"{i}.png", "colour_mean": 0.5, "colour_variance": 0.5 + i, "malformed": i / 100 + 0.005})
    (tmp_path / "parts/000000.json").write_text(json.dumps(rows))
    monkeypatch.setattr(parts.pictures, "sheet", lambda some, path: shown.update({path.name: some}))
    config = AdaptConfig(size="tiny", malformed=0.2)
    parts.finish(config, tmp_path, torch.zeros(4, 3, 32, 16), {}, Machine.of("cpu", ""))
    levels = {title: images[:, 0, 0, 0].tolist() for title, images in shown["dropped.png"].items()}
    assert levels == {"greyscale: the best 0 dropped, then the worst kept": levels[min(levels)],
                      "malformed: the best 5 dropped, then the worst kept": [*range(84, 74, -1)]}
    assert len(levels[min(levels)]) == 10 and json.loads((tmp_path / "report.json").read_text())["kept"] == 80


def test_damage_is_damage_and_the_judge_learns_it():
    """With a random base: what the judge learns is how a figure is arranged."""
    torch.manual_seed(0)
    figure = torch.linspace(0, 255, 32)[:, None].expand(32, 16)          # dark above, bright below
    images = (figure + 20 * torch.randn(200, 3, 32, 16)).clamp(0, 255).to(torch.uint8)
    for kind in DAMAGE:
        damaged = distort(images[:20], [kind], 0)
        assert damaged.shape == images[:20].shape and damaged.dtype == torch.uint8
        assert (damaged != images[:20]).float().mean((1, 2, 3)).min() > 0.05
        assert torch.equal(damaged, distort(images[:20], [kind], 0))
    learned, others, rest = split_for_judge(images)
    assert [len(some) for some in (learned, others, rest)] == [100, 50, 50]
    assert [len(some) for some in split_for_judge(images[:2])] == [1, 1, 0]
    tokenizer = Tokenizer.read()
    base = Diffusion.new(replace(DIFFUSION_PRESETS["tiny"], vocab=len(tokenizer)), tokenizer).eval()
    judge = Judge(base)
    good, bad = (judge.features(some) for some in (learned, distort(learned, DAMAGE, 0)))
    assert torch.allclose(judge.features(learned[:3]), good[:3], atol=1e-4)     # the noise is the same for all

    def loss_of(portion):
        return {"loss": judge_loss(judge.head, good, bad, portion.generator, portion.count)}

    fit = replace(DAD_RECIPES["demo"].judge, steps=100, batch=64)
    Loop(Task("judge", judge.head, fit, 0), loss_of, Machine.of("cpu", "")).run()
    judge.head.eval()
    judge.whole = judge.log_odds(others).sort().values
    assert judge.score(others).tolist() == pytest.approx([int((judge.whole < odds).sum()) / 50
                                                          for odds in judge.log_odds(others)])
    assert (judge.score(rest) <= 0.95).float().mean() > 0.8
    assert (judge.score(distort(rest, DAMAGE[:1], 1)) > 0.95).float().mean() > 0.8


# ---- boxes

def test_a_phrase_gets_the_average_box_of_its_noun(tokenizer):
    source = [Record("", (), 0, ((0.5, 0.2, 1.0, 0.4), (0.5, 0.9, 0.5, 0.2)), ("a black coat", "boots")),
              Record("", (), 1, ((0.4, 0.4, 0.6, 0.6),), ("a red coat",)), Record("", (), 2)]
    boxes = average_boxes(source)
    assert boxes.keys() == {"coat", "boots"} and boxes["boots"] == (0.5, 0.9, 0.5, 0.2)
    assert boxes["coat"] == pytest.approx((0.45, 0.3, 0.8, 0.5))
    target = [Record("a.png", ("A lady in a blue coat and green jeans.",), 0), Record("b.png", ("a tall man",), 1)]
    whole, coat = drafts_of(AdaptConfig(images=2), target, boxes, tokenizer)
    assert coat.phrases == ("a blue coat",) and coat.boxes == (boxes["coat"],)      # the source has no lady, no jeans
    assert record_of(coat) == {"boxes": [[0.45, 0.3, 0.8, 0.5]], "phrases": ("a blue coat",), "image_id": 0,
                               "caption": target[0].captions[0], "origin": "a.png"}
    assert whole.boxes == whole.phrases == ()
    assert record_of(whole) == {"boxes": [[0.5, 0.5, 1.0, 1.0]], "phrases": ("a tall man",), "image_id": 1,
                                "caption": "a tall man", "origin": "b.png"}


def test_latent_moments_match_person_and_background_apart():
    torch.manual_seed(0)
    source, target = torch.randn(50, 4, 16, 8), 2 * torch.randn(60, 4, 16, 8) + 1
    target[:, :, :, :2] -= 5
    moved = transfer_moments(source, source, target)
    for region in ((slice(1, -1), slice(2, -2)), (slice(None), slice(0, 2))):
        if region[1] == slice(2, -2):
            a, b = moved[:, :, region[0], region[1]], target[:, :, region[0], region[1]]
            assert torch.allclose(a.mean((0, 2, 3)), b.mean((0, 2, 3)), atol=1e-4)
            assert torch.allclose(a.std((0, 2, 3)), b.std((0, 2, 3)), rtol=1e-2)
    assert (moved - moved.mean()).sign().eq((source * 2 + 1 - moved.mean()).sign()).float().mean() > 0.6


def test_the_digest_of_a_plan_knows_pixels_of_what_is_restyled(tmp_path):
    draft, digests = Record(str(tmp_path / "a.bmp"), ("a man",), 0), []
    for colour in ("red", "blue"):                      # two files of as many bytes
        Image.new("RGB", (8, 8), colour).save(draft.path)
        digests += [digest_of(content_of([draft], sample)) for sample in ([draft], [])]
    assert digests[0] != digests[2] and digests[1] == digests[3]
    boxed = replace(draft, boxes=((0.5, 0.5, 1.0, 1.0),), phrases=("a man",))
    assert digest_of(content_of([boxed], [draft])) != digests[2]


# ---- adapt.py, at tiny size

def adapt(folder: Path, *flags: str) -> str:
    """What adapt.py prints, which must not fail."""
    return succeed(folder, "adapt.py", "--size", "tiny", "--precision", "float32", *flags)


@pytest.fixture(scope="module")
def made(adapted, tmp_path_factory) -> tuple[Path, str]:
    folder, said = adapted
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("adapt"), dirs_exist_ok=True)), said


def test_adapt_makes_a_set_that_is_read_as_sda(made):
    folder, said = made
    assert "Training the tiny base" in said and "Adapting to icfg" in said and "(drawn data, not photographs)" in said
    sets = [load(str(folder / "out/sda/icfg-tiny"), split, folder, say=lambda line: None) for split in ("train", "val")]
    records = [record for some in sets for record in some.records]
    assert len(records) == 70 and all(record.boxes for record in records)
    with Image.open(records[0].path) as image:
        assert image.size == (16, 32)
    report = json.loads((folder / "out/sda/icfg-tiny/report.json").read_text())
    assert report["made"] == report["kept"] == 70 and report["dropped"] == {"greyscale": 0, "malformed": 0}
    key, thresholds = report["key"], {"grey_mean": 0.02, "grey_variance": 0.0005, "malformed": 0}
    assert key == json.loads((folder / "out/sda/icfg-tiny/parts.key.json").read_text()) | thresholds
    assert key["flags"]["images"] == 70 and key["recipe"]["epochs"] == 0
    with Image.open(folder / "out/sda/icfg-tiny/adaptation.png") as picture:
        assert picture.width > 500


def test_nothing_is_made_twice(made):
    folder, first = made
    images = sorted((folder / "out/sda/icfg-tiny/imgs").rglob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in images}
    again = adapt(folder, "--images", "70", "--malformed", "0")
    assert "out/sda/icfg-tiny is complete" in again
    report = folder / "out/sda/icfg-tiny/report.json"
    measured = json.loads(report.read_text())
    report.unlink()
    again = adapt(folder, "--images", "70", "--malformed", "0")
    assert "branch.safetensors is complete" in again and "parts made" not in again
    assert json.loads(report.read_text()) == measured
    assert {path: path.stat().st_mtime_ns for path in images} == before and len(images) == 70


def test_a_finished_set_outlives_mistakes(made):
    """What cannot be used is told before anything is taken away; another's set is never written to."""
    folder, _ = made
    before = {path: path.read_bytes() for path in (folder / "out/sda/icfg-tiny").glob("*.json")}
    same = ("--size", "tiny", "--precision", "float32", "--images", "70", "--malformed", "0")
    assert {path.name for path in before} == {"report.json", "parts.key.json", "sda_0_5000.json"}
    photograph = folder / "photographs/imgs/own.jpg"
    photograph.parent.mkdir(parents=True)
    photograph.write_bytes(b"mine")
    for flags, named in ((("--base", "nowhere.safetensors"), "nowhere.safetensors"),
                         (("--malformed", "1", "--grey-mean", "1", "--grey-variance", "1"), "dropped every image"),
                         (("--out", "data/demo-tiny/SDA"), "data/demo-tiny/SDA holds files"),
                         (("--out", "photographs", "--no-resume"), "photographs holds files")):
        status, _, err = command(folder, "adapt.py", *same, *flags)
        assert status == 2 and named in err
    assert {path: path.read_bytes() for path in before} == before and photograph.read_bytes() == b"mine"
    for name in ("report.json", "parts.key.json"):
        file = folder / "out/sda/icfg-tiny" / name
        for spoilt in ("{", "[]"):
            file.write_text(spoilt)
            status, _, err = command(folder, "adapt.py", *same)
            assert status == 2 and f"{name} cannot be read" in err
        file.write_bytes(before[file])


def test_what_is_made_anew_says_what_has_changed(made):
    """A network for another recipe, a set for other flags; for another threshold only what it decides."""
    folder, _ = made
    flags = ("--images", "8", "--malformed", "0", "--out", "out/anew", "--seed", "3")
    adapt(folder, *flags)
    images = {path: path.read_bytes() for path in (folder / "out/anew/imgs").rglob("*.png")}
    status, said, err = command(folder, "adapt.py", "--size", "tiny", "--precision", "float32", *flags, "--steps", "7")
    assert status == 2 and "branch" not in said             # before anything is trained anew
    assert "out/anew/parts was made otherwise: flags.steps was 0 and is 7; give another --out" in err
    assert {path: path.read_bytes() for path in (folder / "out/anew/imgs").rglob("*.png")} == images
    said = adapt(folder, *flags, "--steps", "7", "--images", "3", "--no-resume")
    assert "branch step 7/7" in said
    assert ("out/anew/parts is made anew: flags.images was 8 and is 3; flags.steps was 0 and is 7; the content of the "
            "plan has changed") in said
    assert len(list((folder / "out/anew/imgs").rglob("*.png"))) == 3      # what no longer belongs has gone
    flags = (*flags, "--images", "3")
    (folder / "out/anew/sda_5000_10000.json").write_text("[]")
    said = adapt(folder, *flags, "--steps", "7", "--grey-mean", "0")
    assert "Kept 3 of 3" in said and "parts made" not in said
    assert json.loads((folder / "out/anew/report.json").read_text())["key"]["grey_mean"] == 0
    assert not (folder / "out/anew/sda_5000_10000.json").exists()           # nothing of the set before stays
    said = adapt(folder, *flags, "--rank", "0", "--no-resume")       # the paper's branch
    assert "branch step 5/5" in said and "Kept 3 of 3" in said
    branches = sorted(path.parent.name for path in (folder / "out/dad/icfg-tiny-s3").rglob("branch.safetensors"))
    assert branches == ["low-rank-2-5", "low-rank-2-7", "trainable-copy-5"]      # none was lost for another
    said = adapt(folder, *flags, "--no-resume")
    assert "low-rank-2-5/branch.safetensors is complete" in said


def test_another_source_makes_another_set(made):
    """Not pixels alone: what stands beside them is copied into the set, or decides where phrases are looked for."""
    folder, _ = made
    shutil.copytree(folder / "data/demo-tiny", folder / "own")
    flags = ("--source", "own", "--data-root", "own", "--base", "out/base-tiny/base.safetensors", "--images", "8",
             "--malformed", "0", "--mode", "restyle", "--out", "out/own")
    adapt(folder, *flags)
    assert "out/own is complete" in adapt(folder, *flags, "--workers", "1")
    same = [str((folder / value).resolve()) if value == "own" else value for value in flags]
    assert "out/own is complete" in adapt(folder, *same)                    # the same set under another path
    for file in (folder / "own/SDA").glob("sda_*.json"):
        file.write_text(re.sub(r'"caption": "', '"caption": "Look, ', file.read_text()))
    status, _, err = command(folder, "adapt.py", "--size", "tiny", "--precision", "float32", *flags)
    assert status == 2 and "out/own/parts was made otherwise: the content of the plan has changed" in err
    assert "Making 8 images" in adapt(folder, *flags, "--no-resume")
    rows = json.loads((folder / "out/own/sda_0_5000.json").read_text())
    assert len(rows) == 8 and all(row["caption"].startswith("Look, ") for row in rows)


def test_a_base_of_another_source_is_neither_used_nor_replaced(made):
    folder, _ = made
    base, here = folder / "out/base-tiny/base.safetensors", ("--source", "data/demo-tiny")
    before = base.read_bytes()
    for flags in ((*here, "--data-root", "data/demo-tiny"), ("--train-base", *here)):
        status, _, err = command(folder, "adapt.py", "--size", "tiny", "--precision", "float32", *flags)
        assert status == 2 and "out/base-tiny/base.safetensors was" in err and "data/demo-tiny" in err
    assert base.read_bytes() == before


def test_the_prompts_of_a_caption_speak_of_one_person(made):
    folder, _ = made
    rows = json.loads((folder / "out/sda/icfg-tiny/sda_0_5000.json").read_text())
    people = {row["origin"]: row["image_id"] for row in rows}       # ICFG has one caption an image
    assert len(set(people.values())) == len(people) < len(rows)
    assert all(people[row["origin"]] == row["image_id"] for row in rows)


def test_a_set_half_made_anew_is_no_set(made, tmp_path):
    """Its images are others already: neither the old annotation nor the old part's record may vouch for them."""
    folder, _ = made
    flags = ("--images", "70", "--malformed", "0", "--out", "out/half")
    adapt(folder, *flags)
    whole = {path: path.read_bytes() for path in sorted((folder / "out/half").rglob("*")) if path.is_file()}
    run = Fresh(tmp_path, folder, script, "adapt.py", "--size", "tiny", "--precision", "float32", *flags, "--captions",
                "source", "--no-resume")
    run.until(lambda: "parts made" in run.out)
    run.kill()
    assert "parts made" in run.out, "it ended before a part was made"
    assert [path.name for path in (folder / "out/half").glob("*.json")] == ["parts.key.json"]
    adapt(folder, *flags, "--no-resume")
    assert {path: path.read_bytes() for path in whole} == whole


def test_another_seed_another_target_a_single_image(made):
    """The base of the first seed serves all; what was learned from other images is not taken for one's own."""
    folder, _ = made
    assert "icfg-tiny-s1" in adapt(folder, "--seed", "1", "--images", "8", "--malformed", "0")
    assert "Kept 1 of 1 images" in adapt(folder, "--images", "1", "--malformed", "0", "--out", "out/one")
    shutil.copytree(folder / "data/demo-tiny", folder / "other")
    path = next((folder / "other/ICFG-PEDES/imgs/train").rglob("*.jpg"))
    few = ("--images", "8", "--malformed", "0", "--out")
    own = ("--source", "data/demo-tiny", "--data-root", "other", "--base", "out/base-tiny/base.safetensors", *few)
    adapt(folder, *own, "out/other")
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    said = adapt(folder, *own, "out/changed")
    assert "icfg-tiny-s0-real/low-rank-2-5/branch.safetensors is made anew: contents was" in said
    assert "icfg-tiny-s0/low-rank-2-5/branch.safetensors is complete" in adapt(folder, *few, "out/again")
    assert AdaptConfig(data_root="other").usual_out == "out/sda/icfg-real"      # not the set that train.py looks for


def test_photographs_without_captions_get_the_sources_words(made):
    """A set whose images all have the same caption counts as one without captions, and gives the same images."""
    folder, _ = made
    photos = folder / "photos/a camera"
    shutil.copytree(folder / "data/demo-tiny/ICFG-PEDES/imgs/test", photos)
    (photos / "notes.txt").write_text("of a walk")
    own = "--images", "70", "--malformed", "0", "--grey-mean", "0"
    said = adapt(folder, "--target", "photos/a camera", *own)
    assert "no captions: the source's will be used" in said
    assert "Making 70 images in out/sda/a camera-tiny-real." in said
    made_of = folder / "out/sda/a camera-tiny-real"
    rows = json.loads((made_of / "sda_0_5000.json").read_text())
    source = {row["image"] for row in json.loads((folder / "data/demo-tiny/SDA/sda_0_5000.json").read_text())}
    assert len(rows) == 70 and all(row["origin"].split("/imgs/")[1] in source for row in rows)
    paths = [Path(path).relative_to(folder / "photos") for path in photographs(photos, lambda line: None)]
    records = [{"split": "train", "captions": ["a person"], "file_path": str(path), "id": i}
               for i, path in enumerate(paths)]
    shutil.copytree(folder / "photos", folder / "same/CUHK-PEDES")
    (folder / "same/CUHK-PEDES/reid_raw.json").write_text(json.dumps(records))
    said = adapt(folder, "--target", "cuhk", "--data-root", "same", "--source", "data/demo-tiny", "--base",
                 "out/base-tiny/base.safetensors", *own, "--out", "out/same")
    assert "no captions: the source's will be used" in said
    for row in rows:
        image = f"imgs/{row['image']}"
        assert (folder / "out/same" / image).read_bytes() == (made_of / image).read_bytes()
    assert "out/sda/a camera-tiny-real is complete" in adapt(folder, "--target", "photos/a camera/", *own)
    (folder / "linked camera").symlink_to(photos)       # the name that the user gives
    assert "in out/sda/linked camera-tiny-real." in adapt(folder, "--target", "photos/../linked camera", *own)
    (folder / "empty").mkdir()
    (folder / "annotated").mkdir()
    (folder / "annotated/train.json").write_text("[]")
    for flags, told in ((("empty",), "empty has fewer than two training images"),
                        (("annotated",), "annotated holds train.json: give photographs alone"),
                        (("photos", "--data-root", "same"), "without --data-root")):
        status, _, err = command(folder, "adapt.py", "--size", "tiny", "--target", *flags)
        assert status == 2 and told in err


def test_compiled_networks_do_what_plain_ones_do(made, monkeypatch):
    """With a compiler that compiles nothing: a compiled module must be able to stand in the module's place."""
    folder, _ = made
    monkeypatch.chdir(folder)
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or real(module, backend="eager"))
    guided = ("--guidance-from", "0", "--guidance-to", "1", "--sampling-steps", "2")
    for flags in (("--compile", *guided), guided):
        monkeypatch.setattr(sys, "argv", ["adapt.py", "--size", "tiny", "--seed", "7", "--steps", "1", "--images", "8",
                                          "--malformed", "0", "--precision", "float32",
                                          "--out", f"out/compile{len(flags)}", *flags])
        adapt_main()
    first, second = (json.loads((folder / f"out/compile{n}/sda_0_5000.json").read_text()) for n in (7, 6))
    assert len(compiled) == 1 and len(first) == 8       # the denoiser, with the layers of its branch
    for one, other in zip(first, second, strict=True):
        images = [np.asarray(Image.open(folder / f"out/compile{n}/imgs" / row["image"]), np.int16)
                  for n, row in ((7, one), (6, other))]
        assert one["caption"] == other["caption"] and abs(images[0] - images[1]).max() <= 1


def test_filters_that_drop_everything_say_so(made):
    folder, _ = made
    status, out, err = command(folder, "adapt.py", "--size", "tiny", "--images", "8", "--grey-mean", "1",
                               "--grey-variance", "1", "--out", "out/none")
    assert status == 2 and "Kept 0 of 8" in out and "loosen the thresholds" in err


def test_restyling_keeps_captions_and_boxes(made):
    folder, _ = made
    adapt(folder, "--mode", "restyle", "--images", "8", "--malformed", "0")
    source = {record.path: record for record in
              load("sda", "train", folder / "data/demo-tiny", say=lambda line: None).records}
    rows = json.loads((folder / "out/sda/icfg-tiny-restyle/sda_0_5000.json").read_text())
    for row in rows:
        record = source[str(folder / row["origin"])] if row["origin"].startswith("data") else source[row["origin"]]
        assert row["caption"] == record.captions[0] and tuple(row["phrases"]) == record.phrases
        assert np.allclose(row["boxes"], record.boxes, atol=1e-3) and row["image_id"] == record.identity


def test_sets_of_ones_own_and_two_processes(made, tmp_path):
    """The path of real data: source and target from folders; the work shared out by torchrun."""
    folder, _ = made
    flags = ("--size", "tiny", "--source", "data/demo-tiny", "--target", "rstp", "--data-root", "data/demo-tiny",
             "--images", "130", "--malformed", "0", "--precision", "float32", "--out", "out/two", "--device", "cpu",
             "--base", "out/base-tiny/base.safetensors")
    with contextlib.chdir(folder):
        sets.ready("rstp", True, lambda line: None)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}       # as torchrun tells it
    ran = [Fresh(tmp_path / rank, folder, script, "adapt.py", *flags, RANK=rank, LOCAL_RANK=rank, **address)
           for rank in "01"]
    assert [one.status() for one in ran] == [0, 0], ran[0].err + ran[1].err
    report = json.loads((folder / "out/two/report.json").read_text())
    assert "2 process(es)" in ran[0].out and report["kept"] == 130
    assert sum(1 for _ in (folder / "out/two/parts").glob("*.json")) == 3
    assert sum(1 for _ in (folder / "out/two/imgs").rglob("*.png")) == 130


def test_a_base_of_another_size_and_a_single_image_are_refused(made):
    folder, _ = made
    small = ("adapt.py", "--size", "tiny", "--images", "8", "--out", "out/refused")
    status, _, err = command(folder, *small, "--base", str(ROOT / "mra/diffusion/base-demo.safetensors"))
    assert status == 2 and "base-demo.safetensors was trained with another --size than tiny" in err
    root = folder / "single/CUHK-PEDES"
    with contextlib.chdir(folder):
        sets.ready("cuhk", True, lambda line: None)
    shutil.copytree(folder / "data/demo-tiny/CUHK-PEDES", root)
    rows = json.loads((root / "reid_raw.json").read_text())
    (root / "reid_raw.json").write_text(json.dumps([row for row in rows if row["split"] == "train"][:1]))
    status, _, err = command(folder, *small, "--target", "cuhk", "--data-root", "single", "--source", "data/demo-tiny",
                             "--base", "out/base-tiny/base.safetensors")
    assert status == 2 and "fewer than two training images" in err


def test_train_pretrains_on_the_adapted_set(made):
    folder, _ = made
    report, quick = folder / "out/sda/icfg-tiny/report.json", ("--preset", "tiny", "--steps", "2", "--evals", "1")
    report.rename(folder / "report.json")
    status, _, err = command(folder, "train.py", "--dataset", "icfg", *quick)
    assert status == 2 and "out/sda/icfg-tiny is an adapted set that is not finished" in err
    status, _, err = command(folder, "train.py", "--dataset", "out/sda/icfg-tiny", *quick)
    assert status == 2 and "out/sda/icfg-tiny is an adapted set that is not finished" in err
    (folder / "report.json").rename(report)
    said = succeed(folder, "train.py", "--dataset", "icfg", *quick)
    assert "Stage 2 of 3: training on out/sda/icfg-tiny." in said


@pytest.mark.parametrize("flags, named", [
    (("--target", "market"), "--target market: give cuhk, icfg, rstp, or"), (("--target", ""), "or a folder"),
    (("--images", "0"), "--images 0"),
    (("--guidance", "nan"), "--guidance nan"), (("--guidance-from", "0.9"), "--guidance-from 0.9"),
    (("--base", "nowhere.safetensors"), "nowhere.safetensors"), (("--source", "."), "--data-root"),
    (("--data-root", "."), "needs --source"),
    (("--mode", "restyle", "--captions", "source"), "--captions does nothing with --mode restyle"),
    (("--strength", "0.5"), "--strength does nothing with --mode generate"),
    (("--size", "tiny", "--base", "out/base-tiny/base.safetensors"), "out/base-tiny/base.safetensors"),
    (("--mode", "edges"), "--mode: invalid choice"), (("--colour", "red"), "--colour")])
def test_a_mistake_is_one_sentence(tmp_path, flags, named):
    status, _, err = command(tmp_path, "adapt.py", *flags)
    assert status == 2 and named in err and err.count("\n") == 1


def test_a_base_learns_from_worlds_and_keeps_its_words(made):
    folder, _ = made
    flags = "data/demo-tiny", "--base", "out/base-tiny/base.safetensors", "--size", "tiny", "--steps", "3"
    assert "out/worlds-tiny/base.safetensors is ready" in succeed(folder, "tests/study/worlds.py", *flags)
    assert "denoiser.safetensors is complete" in succeed(folder, "tests/study/worlds.py", *flags)
    files = [folder / "out/base-tiny/base.safetensors", folder / "out/worlds-tiny/base.safetensors"]
    before, after = (load_file(file) for file in files)
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and {name for name in before if "text_encoder" in name} < kept
    assert not any(name.startswith("denoiser.encoder.stages") for name in kept)
    machine = Machine.of("cpu", "float32")
    assert networks.load_base(AdaptConfig(size="tiny", base=str(files[1])), machine).config.height == 32


def test_the_shipped_base_loads_and_is_small():
    files = list((ROOT / "mra/diffusion").glob("*.safetensors"))
    assert len(files) == 1 and files[0].stat().st_size < 16e6
    base = networks.load_base(AdaptConfig(), Machine.of("cpu", "float32"))
    assert base.config.height == 64 and not any(parameter.requires_grad for parameter in base.parameters())
    assert all(parameter.isfinite().all() for parameter in base.parameters())
