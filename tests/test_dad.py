"""What DaD does around its networks: prompts, filters, boxes, transfers, the report's measures, and adapt.py itself."""

import contextlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import command, succeed

from adapt import load_base
from adapt import main as adapt_main
from mra.config import AdaptConfig
from mra.data import town
from mra.data.people import COLOURS, sample_person
from mra.data.records import Record, load
from mra.data.words import noun_phrases
from mra.diffusion import gap, making, transfers
from mra.diffusion.boxes import overlap, phrase_box, usual_places
from mra.diffusion.filters import SEEN, UNSEEN, colourfulness, distort, tell_apart
from mra.diffusion.making import filters_of
from mra.diffusion.prompts import VARIANTS, prompts_of, variant
from mra.training import Machine

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


def test_prompts_visit_every_caption_before_any_twice():
    captions = [f"{CAPTION} {i}" for i in range(7)]
    made = prompts_of(captions, 17, seed=1)
    assert len(made) == 17 and {i for i, _ in made[:7]} == set(range(7)) == {i for i, _ in made[7:14]}
    assert [prompt for _, prompt in made[:7]] == [captions[i] for i, _ in made[:7]]
    assert made == prompts_of(captions, 17, seed=1) != prompts_of(captions, 17, seed=2)
    assert len(prompts_of(captions, 1000, seed=1)) == 7 * (VARIANTS + 1)


def test_samples_are_moved_to_the_targets_mean_and_variance_at_each_place(monkeypatch):
    target = 0.5 * torch.randn(500, 2, 3, 2) + torch.arange(12.0).view(2, 3, 2)
    drawn = []

    def sample(config, base, networks, some, looks, draw):
        assert len(some) == making.PART and looks.target is target
        drawn.append(3 * torch.randn(len(some), 2, 3, 2, generator=draw) - 1)
        return drawn[-1], None, None
    monkeypatch.setattr(making, "sample", sample)
    looks = making.Looks(None, target)
    scale, shift = making.calibrate(AdaptConfig(), Machine.of("cpu", ""), None, [], list("abc"), looks)
    moved = scale * torch.cat(drawn) + shift
    torch.testing.assert_close(moved.mean(0), target.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.std(0), target.std(0), atol=1e-4, rtol=1e-4)
    assert len({float(some[0, 0, 0, 0]) for some in drawn}) == making.PROBES // making.PART     # each of its own noise
    monkeypatch.setattr(making, "sample", lambda *given: (torch.ones(making.PART, 2, 3, 2), None, None))    # all alike
    scale, shift = making.calibrate(AdaptConfig(), Machine.of("cpu", ""), None, [], list("abc"), looks)
    torch.testing.assert_close(scale + shift, target.mean(0), atol=1e-3, rtol=1e-3)


def test_what_calibration_says_is_done_to_images(monkeypatch, tmp_path):
    """Scaled by 0 and shifted by 3, all latents are 3. More probes than images are asked for: the target's
    captions, or the images to restyle."""
    real, seen, probed = making.decode, [], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "calibrate", lambda *given: probed.append(given[4]) or (0.0, 3.0))
    monkeypatch.setattr(making, "decode", lambda some, latents, draw: seen.append(latents) or real(some, latents, draw))
    for flags in (("--captions", "source"), ("--mode", "restyle")):
        monkeypatch.setattr(sys, "argv", ["adapt.py", "--size", "tiny", "--images", "8", "--no-measure", "--malformed",
                                          "99", *flags])
        adapt_main()
    assert len(seen) == 2 and all(torch.equal(latents, torch.full_like(latents, 3.0)) for latents in seen)
    for probes, folder in zip(probed, ("ICFG", "SDA"), strict=True):
        assert len(probes) > 8 and all(folder in wish.path for wish in probes)


# ---- filters

def test_near_greyscale_images_have_no_colour():
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8).expand(2, 3, 8, 8)
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    mean, variance = colourfulness(torch.cat([grey, red]))
    assert mean[:2].max() == variance[:2].max() == 0
    assert mean[2] == pytest.approx(2 / 3) and variance[2] == pytest.approx(2 / 9, rel=0.01)


def test_each_filter_has_its_threshold():
    config = AdaptConfig(grey_mean=0.1, grey_variance=0.1, malformed=1.0, mismatch=-1.0)
    good = {"colour_mean": 0.2, "colour_variance": 0.0, "malformed": 0.0, "match": 0.0}
    assert filters_of(config, good) == filters_of(config, {k: v for k, v in good.items() if k != "match"}) == []
    for name, change in (("greyscale", {"colour_mean": 0.05}), ("malformed", {"malformed": 1.1}),
                         ("mismatch", {"match": -1.1})):
        assert filters_of(config, good | change) == [name]
    unjudged = {name: value for name, value in good.items() if name != "match"}
    assert filters_of(replace(config, mismatch=1.0), unjudged) == []


def test_damage_is_damage_and_the_judge_learns_it():
    torch.manual_seed(0)
    figure = torch.linspace(0, 255, 32)[:, None].expand(32, 16)          # dark above, bright below
    images = (figure + 20 * torch.randn(200, 3, 32, 16)).clamp(0, 255).to(torch.uint8)
    for kind in SEEN + UNSEEN:
        damaged = distort(images[:20], [kind], 0)
        assert damaged.shape == images[:20].shape and damaged.dtype == torch.uint8
        assert (damaged != images[:20]).float().mean((1, 2, 3)).min() > 0.1
        assert torch.equal(damaged, distort(images[:20], [kind], 0))
    judge = tell_apart(images[:100], distort(images[:100], SEEN, 0), 60, 0, torch.device("cpu"))
    assert (judge.score(images[100:]) < 0).float().mean() > 0.9
    assert (judge.score(distort(images[100:], SEEN[:1], 1)) > 0).float().mean() > 0.9


# ---- boxes

def test_a_phrase_gets_the_box_of_its_noun(tokenizer):
    ids = tokenizer.encode(caption := "a man in a red coat")
    maps = torch.full((len(ids), 16, 8), 0.01)
    coat = ids.index(tokenizer.encode("coat")[1])
    maps[coat, 4:10, 2:6] = 1.0
    maps[coat - 1] = 1.0                                                  # the adjective looks everywhere
    box, sure = phrase_box(maps, caption, "a red coat", tokenizer, {})
    assert overlap(box, (0.5, 7 / 16, 0.5, 6 / 16)) > 0.6 and 0.5 < sure <= 1
    assert phrase_box(maps, caption, "a blue coat", tokenizer, {}) is None
    assert phrase_box(maps * float("nan"), caption, "a red coat", tokenizer, {}) is None
    places = usual_places([Record("", (), 0, ((0.5, 0.25, 1.0, 0.5),), ("a black coat",))], 16, 8)
    assert list(places) == ["coat"] and places["coat"][:32].all() and not places["coat"][32:].any()
    upper, _ = phrase_box(maps, caption, "a red coat", tokenizer, places)
    assert box[1] + box[3] / 2 > 0.55 and upper[1] + upper[3] / 2 == 0.5          # no coat has been seen lower


def test_overlap_by_hand():
    assert overlap((0.5, 0.5, 1, 1), (0.25, 0.5, 0.5, 1)) == 0.5
    assert overlap((0.2, 0.2, 0.2, 0.2), (0.6, 0.2, 0.2, 0.2)) == 0
    assert overlap((0.5, 0.5, 0.4, 0.4), (0.7, 0.5, 0.4, 0.4)) == pytest.approx(1 / 3)


# ---- transfers

@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    bright = (torch.rand(6, 3, 32, 16, generator=draw) * 100 + 120).to(torch.uint8)
    dark = (torch.rand(6, 3, 32, 16, generator=draw) * torch.tensor([30, 50, 80.0]).view(3, 1, 1) + 20).to(torch.uint8)
    return bright, dark


def test_reinhard_takes_mean_and_spread(pair):
    bright, dark = pair
    moved = transfers.reinhard(bright, dark).float()
    assert (moved.mean((2, 3)) - dark.float().mean((2, 3))).abs().max() < 3
    assert (moved.std((2, 3)) / dark.float().std((2, 3)) - 1).abs().max() < 0.5      # exact in the log space only
    assert (transfers.reinhard(bright, bright).float() - bright.float()).abs().max() <= 1


def test_histogram_takes_the_values_and_keeps_the_ranks(pair):
    bright, dark = pair
    moved = transfers.histogram(bright, dark)
    assert torch.equal(moved.flatten(2).sort(-1).values, dark.flatten(2).sort(-1).values)
    before, after = (x[0, 0].flatten().float() for x in (bright, moved))
    assert torch.equal(after[before.argsort(stable=True)], after.sort().values)


def test_fourier_takes_the_low_frequencies(pair):
    bright, dark = pair
    moved = transfers.fourier(bright, dark).float()
    assert (moved.mean((2, 3)) - dark.float().mean((2, 3))).abs().max() < 6
    assert (transfers.fourier(bright, bright).float() - bright.float()).abs().max() <= 1
    fine = [x - torch.nn.functional.avg_pool2d(x, 5, 1, 2) for x in (moved, bright.float(), dark.float())]
    likeness = [torch.corrcoef(torch.stack([fine[0].flatten(), other.flatten()]))[0, 1] for other in fine[1:]]
    assert likeness[0] > 0.5 > likeness[1]                                # details are still the source's


def test_latent_moments_match_person_and_background_apart():
    torch.manual_seed(0)
    source, target = torch.randn(50, 4, 16, 8), 2 * torch.randn(60, 4, 16, 8) + 1
    target[:, :, :, :2] -= 5
    moved = transfers.match_moments(source, source, target)
    for region in ((slice(1, -1), slice(2, -2)), (slice(None), slice(0, 2))):
        if region[1] == slice(2, -2):
            a, b = moved[:, :, region[0], region[1]], target[:, :, region[0], region[1]]
            assert torch.allclose(a.mean((0, 2, 3)), b.mean((0, 2, 3)), atol=1e-4)
            assert torch.allclose(a.std((0, 2, 3)), b.std((0, 2, 3)), rtol=1e-2)
    assert (moved - moved.mean()).sign().eq((source * 2 + 1 - moved.mean()).sign()).float().mean() > 0.6


# ---- measures

def test_frechet_of_known_normal_distributions():
    torch.manual_seed(0)
    root = torch.linalg.cholesky(torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double())
    first = torch.randn(200_000, 2).double()
    second = torch.randn(200_000, 2).double() @ root.T + torch.tensor([1.0, -2.0])
    cross = torch.linalg.eigvalsh(root @ root.T).sqrt().sum()             # the other covariance is the identity
    assert gap.frechet(first, second) == pytest.approx(float(5 + 2 + 3 - 2 * cross), rel=0.02)
    assert gap.frechet(first, first) == pytest.approx(0, abs=1e-6)
    assert gap.frechet(first, second) == pytest.approx(gap.frechet(second, first), rel=1e-6)


def test_a_fresh_classifier_tells_two_sets_apart_only_where_they_differ():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (600, 3, 32, 16), dtype=torch.uint8)
    device = torch.device("cpu")
    assert gap.separability(images[:300], gap.half_pixel_blur(images[300:]), 0, device, 60) > 0.97
    assert abs(gap.separability(images[:300], images[300:], 0, device, 60) - 0.5) < 0.1


def test_blur_keeps_the_mean_and_takes_the_grain():
    images = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8)
    blurred = gap.half_pixel_blur(images)
    assert (blurred.float().mean() - images.float().mean()).abs() < 1 and blurred.float().std() < images.float().std()


def test_the_reader_is_asked_for_what_the_caption_names():
    people = [sample_person(random.Random(i)) for i in range(3)]
    labels = gap.labels_of(people)
    assert labels.shape == (3, len(gap.KINDS))
    assert list(COLOURS)[labels[1, list(gap.KINDS).index("lower_colour")]] == people[1].lower_colour

    class Oracle:
        """Reads every attribute right, except the upper colour of the last."""
        def score(self, images):
            wrong = labels.clone()
            wrong[2, list(gap.KINDS).index("upper_colour")] += 1
            return torch.cat([torch.nn.functional.one_hot(wrong[:, i] % len(values), len(values))
                              for i, values in enumerate(gap.KINDS.values())]
                             + [torch.zeros(3, len(gap.CAMERAS))], 1).float()

    told = [f"{p.upper_colour} {gap.KINDS['upper'][p.upper][0]}, {p.lower_colour} {gap.KINDS['lower'][p.lower][0]}"
            for p in people]
    found = gap.colour_accuracy(Oracle(), torch.zeros(3), people, told)
    assert found["upper_colour"] == pytest.approx(2 / 3) and found["lower_colour"] == 1.0
    found = gap.colour_accuracy(Oracle(), torch.zeros(3), people, [*told[:2], "a man"])      # it was not asked
    assert found["upper_colour"] == 1.0


def test_nearest_and_shares_by_hand():
    black, white = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    grey = torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)
    assert gap.nearest(grey, torch.cat([black, white])) == 0.2
    rows = {"source": {"frechet": 100.0}, "dad": {"frechet": 10.0}, "exact": {"frechet": 1.0}}
    gap.add_shares(rows)
    assert [row["gap_closed"] for row in rows.values()] == pytest.approx([0, 0.5, 1], abs=1e-4)


def test_light_by_hand():
    """More images than are looked at together: half of them black, half pure red."""
    images = torch.zeros(600, 3, 4, 4, dtype=torch.uint8)
    images[::2, 0] = 255
    assert gap.light(images) == {"brightness": [0.1667, 0.1667], "saturation": [0.5, 0.5], "red-blue": [0.5, 0.5]}


def test_the_name_of_what_is_wished_for_knows_pixels_of_what_is_restyled(tmp_path):
    wish, names = Record(str(tmp_path / "a.bmp"), ("a man",), 0), []
    for colour in ("red", "blue"):                      # two files of as many bytes
        Image.new("RGB", (8, 8), colour).save(wish.path)
        names += [making.name_of([wish], {}, pixels) for pixels in (True, False)]
    assert names[0] != names[2] and names[1] == names[3]
    assert making.name_of([wish], {"man": torch.ones(2)}, True) != names[2]


# ---- adapt.py, at tiny size

def adapt(folder: Path, *flags: str) -> str:
    """What adapt.py prints, which must not fail."""
    return succeed(folder, "adapt.py", "--size", "tiny", "--precision", "float32", *flags)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("adapt")
    return folder, adapt(folder, "--images", "70", "--malformed", "100", "--box-threshold", "0")


def test_adapt_makes_a_set_that_is_read_as_sda(made):
    folder, said = made
    assert "Training the tiny base" in said and "Adapting to icfg" in said and "is drawn data" in said
    sets = [load(str(folder / "out/sda/icfg-tiny"), split, folder, say=lambda line: None) for split in ("train", "val")]
    records = [record for some in sets for record in some.records]
    assert len(records) == 70 and all(record.boxes for record in records)
    with Image.open(records[0].path) as image:
        assert image.size == (16, 32)
    report = json.loads((folder / "out/sda/icfg-tiny/report.json").read_text())
    assert report["made"] == report["kept"] == 70 and report["gap"]["source"]["gap_closed"] == 0
    assert set(report["gap"]) == {"source", "reinhard", "histogram", "fourier", "moments", "dad generate", "exact",
                                  "target"}
    assert all(math.isfinite(row["frechet"]) and 0 <= row["classifier"] <= 1 for row in report["gap"].values())
    with Image.open(folder / "out/sda/icfg-tiny/adaptation.png") as picture:
        assert picture.width > 500


def test_nothing_is_made_twice(made):
    folder, first = made
    images = sorted((folder / "out/sda/icfg-tiny/imgs").rglob("*.png"))
    before = {path: path.stat().st_mtime_ns for path in images}
    again = adapt(folder, "--images", "70", "--malformed", "100", "--box-threshold", "0")
    assert "branch.safetensors is there" in again and "out/sda/icfg-tiny is complete" in again
    report = folder / "out/sda/icfg-tiny/report.json"
    measured = json.loads(report.read_text())
    report.unlink()
    again = adapt(folder, "--images", "70", "--malformed", "100", "--box-threshold", "0")
    assert "part 1" not in again and json.loads(report.read_text()) == measured
    assert {path: path.stat().st_mtime_ns for path in images} == before and len(images) == 70


def test_a_finished_set_outlives_mistakes(made):
    """What cannot be used is told before anything is taken away; another's set is never written to."""
    folder, _ = made
    before = {path: path.read_bytes() for path in (folder / "out/sda/icfg-tiny").glob("*.json")}
    same = ("--size", "tiny", "--precision", "float32", "--images", "70", "--malformed", "100")
    assert len(before) == 2
    for flags, named in ((("--checkpoint", "nowhere.safetensors"), "nowhere.safetensors"),
                         (("--out", "data/demo-tiny/SDA"), "data/demo-tiny/SDA holds a set"),
                         (("--steps", "11"), "another steps")):
        status, _, err = command(folder, "adapt.py", *same, *flags)
        assert status == 2 and named in err
    assert {path: path.read_bytes() for path in before} == before
    for spoilt in ("{", "[]"):
        (folder / "out/sda/icfg-tiny/report.json").write_text(spoilt)
        status, _, err = command(folder, "adapt.py", *same)
        assert status == 2 and "report.json cannot be read" in err
    (folder / "out/sda/icfg-tiny/report.json").write_bytes(before[folder / "out/sda/icfg-tiny/report.json"])


def test_another_source_makes_another_set(made):
    """Not pixels alone: what stands beside them is copied into the set, or decides where phrases are looked for."""
    folder, _ = made
    shutil.copytree(folder / "data/demo-tiny", folder / "own")
    flags = ("--source", "own", "--data-root", "own", "--base", "out/base-tiny/base.safetensors", "--images", "8",
             "--malformed", "100", "--mode", "restyle", "--out", "out/own")
    adapt(folder, *flags)
    assert "out/own is complete" in adapt(folder, *flags, "--recompute")
    for file in (folder / "own/SDA").glob("sda_*.json"):
        file.write_text(re.sub(r'"caption": "', '"caption": "Look, ', file.read_text()))
    assert "Making 8 images" in adapt(folder, *flags)
    rows = json.loads((folder / "out/own/sda_0_5000.json").read_text())
    assert len(rows) == 8 and all(row["caption"].startswith("Look, ") for row in rows)


def test_the_prompts_of_a_caption_speak_of_one_person(made):
    folder, _ = made
    rows = json.loads((folder / "out/sda/icfg-tiny/sda_0_5000.json").read_text())
    people = {row["origin"]: row["image_id"] for row in rows}       # ICFG has one caption an image
    assert len(set(people.values())) == len(people) < len(rows)
    assert all(people[row["origin"]] == row["image_id"] for row in rows)


def test_a_set_half_made_anew_is_no_set(made):
    """Its images are others already: neither the old annotation nor the old part's record may vouch for them."""
    folder, _ = made
    flags = ("--images", "70", "--malformed", "100", "--no-measure", "--out", "out/half")
    adapt(folder, *flags)
    whole = {path: path.read_bytes() for path in sorted((folder / "out/half").rglob("*")) if path.is_file()}
    run = subprocess.Popen([sys.executable, str(ROOT / "adapt.py"), "--size", "tiny", "--precision", "float32", *flags,
                            "--captions", "source"], cwd=folder, stdout=subprocess.PIPE, text=True)
    while "parts made" not in (line := run.stdout.readline()):
        assert line, "it ended before a part was made"
    run.kill()
    run.wait()
    assert not list((folder / "out/half").glob("*.json"))
    adapt(folder, *flags)
    assert {path: path.read_bytes() for path in whole} == whole


def test_another_seed_another_target_a_single_image(made):
    """The base of the first seed serves all; what was learned from other images is not taken for one's own."""
    folder, _ = made
    assert "icfg-tiny-s1" in adapt(folder, "--seed", "1", "--images", "8", "--malformed", "100", "--no-measure")
    assert "single image" in adapt(folder, "--images", "1", "--malformed", "100", "--out", "out/one")
    shutil.copytree(folder / "data/demo-tiny", folder / "other")
    path = next((folder / "other/ICFG-PEDES/imgs/train").rglob("*.jpg"))
    Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    status, _, err = command(folder, "adapt.py", "--size", "tiny", "--source", "data/demo-tiny", "--data-root", "other",
                             "--base", "out/base-tiny/base.safetensors")
    assert status == 2 and "another contents" in err


def test_compiled_networks_do_what_plain_ones_do(made, monkeypatch):
    """With a compiler that compiles nothing: a compiled module must be able to stand in the module's place."""
    folder, _ = made
    monkeypatch.chdir(folder)
    real, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or real(module, backend="eager"))
    monkeypatch.setattr(making, "calibrate", lambda *given: (1.0, 0.0))      # of other sizes, to be traced again
    guided = ("--domain-guidance", "1.5", "--guidance-from", "0", "--guidance-to", "1", "--sampling-steps", "2")
    for flags in (("--compile", *guided), guided):
        monkeypatch.setattr(sys, "argv", ["adapt.py", "--size", "tiny", "--seed", "7", "--steps", "1", "--images", "8",
                                          "--malformed", "100", "--no-measure", "--precision", "float32",
                                          "--out", f"out/compile{len(flags)}", *flags])
        adapt_main()
    first, second = (json.loads((folder / f"out/compile{n}/sda_0_5000.json").read_text()) for n in (9, 8))
    assert len(compiled) == 4 and len(first) == 8       # denoiser and branch, to train and to sample
    for one, other in zip(first, second, strict=True):
        images = [np.asarray(Image.open(folder / f"out/compile{n}/imgs" / row["image"]), np.int16)
                  for n, row in ((9, one), (8, other))]
        assert one["caption"] == other["caption"] and abs(images[0] - images[1]).max() <= 1


def test_filters_that_drop_everything_say_so(made):
    folder, _ = made
    status, out, err = command(folder, "adapt.py", "--size", "tiny", "--images", "8", "--malformed", "-100", "--out",
                               "out/none")
    assert status == 2 and "Kept 0 of 8" in out and "loosen the thresholds" in err


def test_restyling_keeps_captions_and_boxes(made):
    folder, _ = made
    adapt(folder, "--mode", "restyle", "--condition", "structure", "--images", "8", "--malformed", "100",
          "--no-measure")
    source = {record.path: record for record in
              load("sda", "train", folder / "data/demo-tiny", say=lambda line: None).records}
    rows = json.loads((folder / "out/sda/icfg-tiny-restyle-structure/sda_0_5000.json").read_text())
    for row in rows:
        record = source[str(folder / row["origin"])] if row["origin"].startswith("data") else source[row["origin"]]
        assert row["caption"] == record.captions[0] and tuple(row["phrases"]) == record.phrases
        assert np.allclose(row["boxes"], record.boxes, atol=1e-3) and row["image_id"] == record.identity


def test_sets_of_ones_own_and_two_processes(made):
    """The path of real data: source and target from folders; the work shared out by torchrun."""
    folder, _ = made
    flags = ("--size", "tiny", "--source", "data/demo-tiny", "--target", "rstp", "--data-root", "data/demo-tiny",
             "--images", "130", "--malformed", "100", "--precision", "float32", "--out", "out/two", "--device", "cpu",
             "--base", "out/base-tiny/base.safetensors")
    with contextlib.chdir(folder):
        town.ready("rstp", True, lambda line: None)
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "adapt.py"),
                          *flags], cwd=folder, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((folder / "out/two/report.json").read_text())
    assert "2 process(es)" in ran.stdout and report["kept"] == 130 and "gap" not in report
    assert sum(1 for _ in (folder / "out/two/parts").glob("*.json")) == 3
    assert sum(1 for _ in (folder / "out/two/imgs").rglob("*.png")) == 130


def test_a_base_of_another_size_and_a_single_image_are_refused(made):
    folder, _ = made
    small = ("adapt.py", "--size", "tiny", "--images", "8", "--no-measure")
    status, _, err = command(folder, *small, "--base", str(ROOT / "mra/diffusion/base-demo.safetensors"))
    assert status == 2 and "base-demo.safetensors was trained with another --size than tiny" in err
    root = folder / "single/CUHK-PEDES"
    with contextlib.chdir(folder):
        town.ready("cuhk", True, lambda line: None)
    shutil.copytree(folder / "data/demo-tiny/CUHK-PEDES", root)
    rows = json.loads((root / "reid_raw.json").read_text())
    (root / "reid_raw.json").write_text(json.dumps([row for row in rows if row["split"] == "train"][:1]))
    status, _, err = command(folder, *small, "--target", "cuhk", "--data-root", "single", "--source", "data/demo-tiny",
                             "--base", "out/base-tiny/base.safetensors")
    assert status == 2 and "single training image" in err


def test_train_pretrains_on_the_adapted_set(made):
    folder, _ = made
    report = folder / "out/sda/icfg-tiny/report.json"
    report.rename(folder / "report.json")
    status, _, err = command(folder, "train.py", "--dataset", "icfg", "--preset", "tiny", "--steps", "2")
    assert status == 2 and "out/sda/icfg-tiny is an adapted set that is not finished" in err
    status, _, err = command(folder, "train.py", "--dataset", "out/sda/icfg-tiny", "--preset", "tiny", "--steps", "2")
    assert status == 2 and "out/sda/icfg-tiny is an adapted set that is not finished" in err
    (folder / "report.json").rename(report)
    assert "pretraining on out/sda/icfg-tiny first" in succeed(folder, "train.py", "--dataset", "icfg", "--preset",
                                                               "tiny", "--steps", "2")


def test_a_retriever_judges_captions_as_it_has_learned_them(made, monkeypatch):
    """One that was fine-tuned on ICFG has seen words without signs between them."""
    folder, _ = made
    real, asked = making.agreement, []
    monkeypatch.setattr(making, "agreement", lambda model, tokenizer, images, captions: (
        asked.extend(captions) or real(model, tokenizer, images, captions)))
    for dataset in ("icfg", "sda"):
        succeed(folder, "train.py", "--dataset", dataset, "--preset", "tiny", "--steps", "1", "--init", "none",
                "--out", f"out/{dataset}")
        adapt(folder, "--images", "8", "--malformed", "100", "--mismatch", "-1000", "--no-measure", "--captions",
              "source", "--checkpoint", f"out/{dataset}/best.safetensors", "--out", "out/judged")
    clean, raw = asked[:8], asked[8:]
    rows = json.loads((folder / "out/judged/sda_0_5000.json").read_text())
    assert [row["caption"] for row in rows] == raw and all("match" in row for row in rows)
    assert all(re.fullmatch("[a-z0-9 ]+", caption) for caption in clean) and clean != raw


@pytest.mark.parametrize("flags, named", [
    (("--target", "market"), "--target market"), (("--images", "0"), "--images 0"),
    (("--guidance", "nan"), "--guidance nan"), (("--guidance-from", "0.9"), "--guidance-from 0.9"),
    (("--base", "nowhere.safetensors"), "nowhere.safetensors"), (("--source", "."), "--data-root"),
    (("--size", "tiny", "--base", "out/base-tiny/base.safetensors"), "out/base-tiny/base.safetensors"),
    (("--checkpoint", "ft_cuhk.pth"), "ft_cuhk.pth: no such file of weights"),      # a released one
    (("--sampler", "euler"), "--sampler euler"), (("--colour", "red"), "--colour")])
def test_a_mistake_is_one_sentence(tmp_path, flags, named):
    status, _, err = command(tmp_path, "adapt.py", *flags)
    assert status == 2 and named in err and err.count("\n") == 1


def test_the_shipped_base_loads_and_is_small():
    files = list((ROOT / "mra/diffusion").glob("*-demo.safetensors"))
    assert len(files) == 2 and sum(file.stat().st_size for file in files) < 16e6
    base = load_base(AdaptConfig(), Machine(torch.device("cpu"), "float32", 0, 1, lambda line: None))
    assert base.config.height == 64 and not any(parameter.requires_grad for parameter in base.parameters())
    assert all(parameter.isfinite().all() for parameter in base.parameters())
