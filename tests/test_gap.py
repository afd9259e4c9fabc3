"""How close made images are to the target: transfers, measures, the reader, and the report of a set of adapt.py."""

import json
import math
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_commands import ROOT, command, succeed

from mra.config import Fit
from mra.diffusion.filters import DAMAGE, distort
from mra.formats.read import load
from mra.run import checkpoint
from mra.run.machine import Machine
from mra.town.drawing import render
from mra.town.people import COLOURS, sample_person
from tests.study import gap, gap_table, transfers
from tests.study.portraits import portraits

CPU = Machine.of("cpu", "float32")
FIT = Fit(60, 32, 2e-3, warmup=0.0, weight_decay=0.05, average=0.0)
OUT = "out/sda/icfg-tiny"


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
    assert gap.separability(images[:300], gap.half_pixel_blur(images[300:]), FIT, 0, CPU) > 0.97
    assert abs(gap.separability(images[:300], images[300:], FIT, 0, CPU) - 0.5) < 0.1


def test_a_classifier_depends_on_its_seed_and_on_nothing_before():
    torch.manual_seed(1)
    images = torch.randint(0, 256, (40, 3, 16, 8), dtype=torch.uint8)
    fit = Fit(2, 4, 2e-3, average=0.0)
    first, again, other = (gap.tell_apart(images[:20], images[20:], fit, seed, CPU).score(images) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_blur_keeps_the_mean_and_takes_the_grain():
    images = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8)
    blurred = gap.half_pixel_blur(images)
    assert (blurred.float().mean() - images.float().mean()).abs() < 1 and blurred.float().std() < images.float().std()


def test_nearest_and_distance_closed_by_hand():
    black, white = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    grey = torch.full((1, 3, 4, 4), 51, dtype=torch.uint8)
    assert gap.nearest(grey, torch.cat([black, white])) == 0.2
    rows = {"source": {"frechet": 100.0}, "dad": {"frechet": 10.0}, "exact": {"frechet": 1.0}}
    gap.add_distance_closed(rows)
    assert [row["distance_closed"] for row in rows.values()] == pytest.approx([0, 0.5, 1], abs=1e-4)


def test_light_by_hand():
    """More images than are computed at once: half of them black, half pure red."""
    images = torch.zeros(600, 3, 4, 4, dtype=torch.uint8)
    images[::2, 0] = 255
    assert gap.light(images) == {"brightness": [0.1667, 0.1667], "saturation": [0.5, 0.5], "red-blue": [0.5, 0.5]}


def test_distance_by_hand():
    """A quarter of the resolution: a single white pixel of sixteen counts a sixteenth."""
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    others = images.clone()
    others[0, :, 0, 0] = 255
    others[1] = 255
    assert gap.distance(images, others) == pytest.approx((1 / 16 + 1) / 2, abs=1e-4)


def test_overlap_by_hand():
    assert gap.overlap((0.5, 0.5, 1, 1), (0.25, 0.5, 0.5, 1)) == 0.5
    assert gap.overlap((0.2, 0.2, 0.2, 0.2), (0.6, 0.2, 0.2, 0.2)) == 0
    assert gap.overlap((0.5, 0.5, 0.4, 0.4), (0.7, 0.5, 0.4, 0.4)) == pytest.approx(1 / 3)


# ---- the judge, on damage that it has not seen

def test_unseen_damage_is_damage_of_another_kind():
    torch.manual_seed(0)
    figure = torch.linspace(0, 255, 32)[:, None].expand(32, 16)           # dark above, bright below
    images = (figure + 20 * torch.randn(20, 3, 32, 16)).clamp(0, 255).to(torch.uint8)
    assert not set(gap.UNSEEN) & set(DAMAGE)
    for kind in gap.UNSEEN:
        damaged = distort(images, [kind], 0)
        assert damaged.shape == images.shape and damaged.dtype == torch.uint8
        assert (damaged != images).float().mean((1, 2, 3)).min() > 0.1
        assert torch.equal(damaged, distort(images, [kind], 0))


def test_the_judges_skill_is_measured_on_the_quarter_that_it_has_not_seen():
    """An oracle calls damaged what is not flat. Joined halves of flat images are not; other damage leaves them flat."""
    class Oracle:
        def score(self, images):
            asked.append(images)
            return (images.float().flatten(1).std(1) > 1).float()

    asked, images = [], torch.arange(40, dtype=torch.uint8).mul(6).view(40, 1, 1, 1).repeat(1, 3, 8, 8)
    found = gap.judge_skill(Oracle(), images, 0.03)
    good, bad = asked
    assert torch.equal(good, images[30:]) and torch.equal(bad, distort(good, gap.UNSEEN, 1))
    joined = sum(len(image.unique()) > 1 for image in bad)
    assert joined in (1, 2) and found == {"good images kept": 1.0, "damaged images dropped": joined / 10}
    assert gap.judge_skill(Oracle(), images, 0.0)["damaged images dropped"] == 0


# ---- the reader

def test_the_reader_is_asked_for_what_the_caption_names():
    people = [sample_person(random.Random(i)) for i in range(3)]
    labels = gap.labels_of(people)
    assert labels.shape == (3, len(gap.KINDS))
    assert list(COLOURS)[labels[1, list(gap.KINDS).index("lower_colour")]] == people[1].lower_colour

    class Oracle:
        """Reads every attribute right, except the shoes of the first and the upper colour of the last."""
        def score(self, images):
            wrong = labels.clone()
            wrong[0, list(gap.KINDS).index("shoes")] += 1
            wrong[2, list(gap.KINDS).index("upper_colour")] += 1
            return torch.cat([torch.nn.functional.one_hot(wrong[:, i] % len(values), len(values))
                              for i, values in enumerate(gap.KINDS.values())]
                             + [torch.zeros(3, len(gap.CAMERAS))], 1).float()

    told = [f"{p.upper_colour} {gap.KINDS['upper'][p.upper][0]}, {p.lower_colour} {gap.KINDS['lower'][p.lower][0]}, "
            f"{gap.KINDS['shoes'][p.shoes][0]}" for p in people]
    found = gap.garment_accuracy(Oracle(), torch.zeros(3), people, told)
    assert found == pytest.approx({"upper_colour": 2 / 3, "lower_colour": 1.0, "shoes": 2 / 3})
    found = gap.garment_accuracy(Oracle(), torch.zeros(3), people, [*told[:2], "a man"])      # it was not asked
    assert found["upper_colour"] == 1.0 and found["shoes"] == 0.5


def test_the_loss_of_reading_is_the_mean_cross_entropy_of_all_answers():
    torch.manual_seed(0)
    reader, images = gap.Reader(), torch.randint(0, 256, (2, 3, 16, 8), dtype=torch.uint8)
    labels = torch.tensor([[size - 1 for size in gap.SIZES], [0] * len(gap.SIZES)])
    scores, first, by_hand = reader.score(images), 0, []
    for number, size in enumerate(gap.SIZES):
        chances = scores[:, first:first + size].softmax(1)
        by_hand += [-math.log(chances[i, labels[i, number]]) for i in range(2)]
        first += size
    assert gap.reading_loss(reader, images, labels).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_the_shipped_reader_reads_colours_and_cameras():
    reader = gap.read_reader("demo", torch.device("cpu"))
    people = gap.strangers(60, seed=9)
    drawn = portraits("cuhk", people, 9, (64, 32), 1)
    images = gap.stacked([one.pixels for one in drawn])
    found = gap.garment_accuracy(reader, images, people, [one.words.caption for one in drawn])
    assert found["upper_colour"] > 0.6 and found["lower_colour"] > 0.6            # of 12 colours
    cameras = reader.score(images).split(gap.SIZES, 1)[-1].argmax(1)
    assert sum(gap.CAMERAS[camera] == ("cuhk", one.camera) for camera, one in zip(cameras, drawn)) > 40      # of 60
    assert (ROOT / "tests/study/reader-demo.safetensors").stat().st_size < 2e6


# ---- the report of a set

@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Each portrait is drawn once for all measurements: that drawing is pure is tested in test_town.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.study.portraits.render", cache(render))
        yield


def adapt(folder, *flags: str) -> str:
    return succeed(folder, "adapt.py", "--size", "tiny", "--precision", "float32", "--malformed", "0", *flags)


@pytest.fixture(scope="module")
def measured(adapted, tmp_path_factory):
    """A folder with a set, its gap.json, a trained reader, and what the measurement printed. Not to be changed.

    The set is a smaller one of the same networks: for each of its images several people are drawn.
    """
    folder = Path(shutil.copytree(adapted[0], tmp_path_factory.mktemp("gap"), dirs_exist_ok=True))
    adapt(folder, "--images", "24", "--no-resume")
    status, _, err = command(folder, "tests/study/gap.py", OUT)
    assert status == 2 and "--train-reader --size tiny" in err and err.count("\n") == 1
    assert "reader.safetensors is ready" in succeed(folder, "tests/study/gap.py", "--train-reader", "--size", "tiny")
    with Image.open(folder / OUT / "adaptation.png") as picture:
        two_rows = picture.height
    said = succeed(folder, "tests/study/gap.py", OUT)
    with Image.open(folder / OUT / "adaptation.png") as picture:
        assert picture.height == 2 * two_rows               # source, adapted, exact, target
    return folder, said


def test_a_set_is_measured_against_every_other_way(measured):
    folder, said = measured
    assert "judge.safetensors is complete" in said and "decoder.safetensors is complete" in said
    report = json.loads((folder / OUT / "gap.json").read_text())
    table = report["gap"]
    assert list(table) == ["source", "reinhard", "histogram", "fourier", "moments", "dad generate", "exact", "target"]
    assert all(math.isfinite(row["frechet"]) and 0 <= row["classifier"] <= 1 for row in table.values())
    assert table["source"]["distance_closed"] == 0 and table["exact"]["distance_closed"] == 1
    assert "upper_colour" in table["dad generate"] and "upper_colour" not in table["target"]
    assert f"| dad generate | {table['dad generate']['frechet']:.3f} |" in said
    assert report["made"] == report["kept"] == 24 and report["key"]["flags"]["target"] == "icfg"
    assert report["boxes"]["phrases"] > 0 and 0 <= report["boxes"]["made"] <= 1
    assert set(report["nearest training image"]) == {"made", "held out"}
    assert set(report["judge of malformed people"]) == {"good images kept", "damaged images dropped"}


def test_a_measured_set_is_a_set_as_before(measured):
    """gap.json is not taken for records, and nothing that adapt.py wrote has changed but its picture."""
    folder, _ = measured
    records = load(str(folder / OUT), "train", folder, say=lambda line: None).records
    assert len(records) > 15
    before = {path: path.read_bytes() for path in sorted((folder / OUT).rglob("*")) if path.is_file()}
    assert "is complete" in adapt(folder, "--images", "24")
    succeed(folder, "tests/study/gap.py", OUT)
    assert {path: path.read_bytes() for path in before} == before       # the same numbers again


def test_restyled_images_are_compared_with_exact_ones_of_the_same_pose(measured):
    folder, _ = measured
    adapt(folder, "--images", "8", "--mode", "restyle", "--strength", "0", "--out", "out/restyled")
    succeed(folder, "tests/study/gap.py", "out/restyled")
    report = json.loads((folder / "out/restyled/gap.json").read_text())
    found = report["distance to the exact image of the same person and pose"]
    assert set(found) == {"source", "restyled"} and all(0 < value < 1 for value in found.values())
    assert "dad restyle" in report["gap"] and "boxes" not in report


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(measured, tmp_path):
    folder, _ = measured
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    branch = tmp_path / "out/dad/icfg-tiny-s0/low-rank-2-5/branch.safetensors"
    before = branch.read_bytes()

    def refused(out: str) -> str:
        status, _, err = command(tmp_path, "tests/study/gap.py", out)
        assert status == 2 and err.count("\n") == 1 and branch.read_bytes() == before
        return err

    assert "nowhere has no report.json" in refused("nowhere") and not (tmp_path / "nowhere").exists()
    report = tmp_path / OUT / "report.json"
    content = json.loads(report.read_text())
    for name, value, told in (("contents", "other", "contents was other"), ("base", "other", "base was other"),
                              ("recipe", {"epochs": 7}, "recipe.epochs was 7")):
        report.write_text(json.dumps(content | {"key": content["key"] | {name: value}}))
        assert told in refused(OUT)
    report.write_text(json.dumps({"made": 1}))
    assert "report.json: its content is incomplete" in refused(OUT)
    report.write_text(json.dumps(content))
    file, = (tmp_path / OUT).glob("sda_*.json")
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0], rows[1] | {"origin": "photographs/1.jpg"}]))
    assert "photographs/1.jpg, which is not an image of the demo town" in refused(OUT)
    file.write_text(json.dumps(rows[:1]))
    assert "a single image" in refused(OUT)


def test_a_reader_is_trained_once(measured):
    folder, _ = measured
    file = folder / "out/base-tiny/reader.safetensors"
    before = file.stat().st_mtime_ns
    assert "reader.safetensors is complete" in succeed(folder, "tests/study/gap.py", "--train-reader", "--size", "tiny")
    assert file.stat().st_mtime_ns == before
    key = checkpoint.load(file)[1]["key"]
    assert key["network"] == "reader" and key["people"] == 20 and key["fit"]["steps"] == 5


def test_the_table_is_made_of_old_reports_and_of_new_ones(measured, capsys):
    folder, _ = measured
    old = sorted((ROOT / "tests/study/gap_reports").glob("icfg-s*.json"))
    gap_table.main([*map(str, old), str(folder / OUT / "gap.json")])
    said = capsys.readouterr().out
    assert "icfg, generate, seeds [0, 0, 1, 2], 1500 images" in said
    gap_table.main(list(map(str, old)))
    said = capsys.readouterr().out
    assert "| images | Frechet distance | distance closed |" in said
    assert "| dad generate | 35.3 +- 1.5 | 60.9 +- 1.7 % | 0.969" in said        # as in tests/study/README.md
    gap_table.main([str(folder / OUT / "gap.json")])
    said = capsys.readouterr().out
    assert "icfg, generate, seeds [0], 24 images" in said and "| exact |" in said and "- boxes, made: 0." in said
