"""The study: the quick version as a user runs it, every kind of image set, and the table from runs made by hand."""

import json

import pytest
import torch
from PIL import Image
from test_commands import command, succeed

from mra import study
from mra.data.records import load


def made_run(arm, target, seed, r1, losses="regions"):
    metrics = {"R@1": r1, "mAP": r1 / 2, "twins R@1": r1 - 5, "rest R@1": r1 + 2}
    return {"arm": arm, "losses": losses, "target": target, "seed": seed, "labelled": {"zero-shot": 0},
            "results": {"zero-shot": {target: {"embeddings": metrics, "re-ranked": metrics | {"R@1": r1 + 1}}}}}


def test_a_row_is_paired_with_source_and_exact_of_the_same_target_and_seed():
    runs = [made_run(arm, "icfg", seed, r1) for arm, figures in
            {"source": (10.0, 20.0), "exact": (50.0, 60.0), "dad": (40.0, 50.0)}.items()
            for seed, r1 in enumerate(figures)]
    runs += [made_run("source", "cuhk", 0, 90.0), made_run("source", "icfg", 0, 0.0, "pairs")]
    cells = study.row(runs, "regions", "dad", "zero-shot")
    assert cells == {"losses": "regions", "arm": "dad", "runs": "2", "labelled pairs": "0", "R@1": "45.0 +- 7.1",
                     "mAP": "22.5 +- 3.5", "re-ranked R@1": "46.0 +- 7.1", "R@1 of twins": "40.0 +- 7.1",
                     "R@1 - source": "+30.0 [+30.0, +30.0]", "gap closed": "75 %"}
    assert study.row(runs, "regions", "source", "zero-shot")["gap closed"] == "0 %"
    assert study.row(runs, "regions", "exact", "zero-shot")["gap closed"] == "100 %"
    assert study.row(runs, "pairs", "source", "zero-shot")["gap closed"] == ""


def test_what_the_region_losses_add_is_paired_too():
    runs = [made_run("dad", target, 0, r1, losses) for losses, r1 in
            (("regions", 40.0), ("pairs", 37.0), ("released", 38.0)) for target in study.TARGETS]
    for one in runs:
        if one["losses"] == "pairs":
            one["results"]["zero-shot"][one["target"]]["embeddings"]["twins R@1"] -= 4
    gain = "{0} [{0}, {0}]".format
    assert study.regions_row(runs, "dad", "zero-shot") == {
        "arm": "dad", "stage": "zero-shot", "R@1": gain("+3.0"), "R@1 of twins": gain("+7.0"),
        "R@1 of the rest": gain("+3.0"), "R@1 where RPC ignores the box": gain("+1.0")}
    assert study.regions_row([one for one in runs if one["losses"] != "pairs"], "dad", "zero-shot") == {}


def test_other_targets_have_a_column_where_they_were_tested():
    run = made_run("dad", "icfg", 0, 40.0)
    run["results"]["zero-shot"] |= {"cuhk": {"embeddings": {"R@1": 10.0}}, "rstp": {"embeddings": {"R@1": 30.0}}}
    assert study.row([run], "regions", "dad", "zero-shot")["R@1 on other targets"] == "20.0"


def test_the_curve_is_of_the_seeds_that_every_share_has(tmp_path):
    arms = ("source", *study.SHARES, "dad")
    group = {arm: {("icfg", seed): made_run(arm, "icfg", seed, 10.0 * number + seed) for seed in (0, 1)}
             for number, arm in enumerate(arms)}
    del group["dad"]["icfg", 1]
    points = study.curve(group)
    assert points == {0.0: [0.0], 0.05: [10.0], 0.25: [20.0], 0.5: [30.0], 1.0: [40.0]}
    study.figures.curve(points, "R@1", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:       # the values at 25 and 50 %
        assert picture.getpixel((210, 190)) == picture.getpixel((360, 115)) == (30, 150, 60)
    assert study.curve(group | {"dad": {}}) == {}


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw, inside = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        gains = (3 + torch.randn(15, generator=draw)).tolist()
        low, high = json.loads(study.interval(gains, 500).split(" ", 1)[1].replace("+", ""))
        inside += low <= 3 <= high
    assert 0.85 < inside / 200 < 0.98       # 15 values: the bootstrap's intervals are a little narrow


def test_the_main_arms_come_with_five_seeds_on_three_targets_and_the_others_with_two_on_one():
    runs = list(study.plan(study.StudyConfig()))
    main = [one for one in runs if (one.arm, one.losses) in study.MAIN]
    others = [one for one in runs if (one.arm, one.losses) not in study.MAIN]
    assert len(main) == 6 * 3 * 5 and {one.arm for one in runs} == set(study.ARMS)
    assert {one.target for one in others} == {"icfg"} and {one.seed for one in others} == {0, 1}
    assert len({one.name for one in runs}) == len(runs)
    assert [one.name for one in study.plan(study.StudyConfig(arms=("dad",), targets=("rstp",), seeds=("7",)))] == [
        "regions-dad-rstp-demo-1500-s7", "pairs-dad-rstp-demo-1500-s7"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, succeed(folder, "mra/study.py", "--quick", "--images", "60")


def test_quick_runs_from_start_to_table(quick):
    folder, said = quick
    runs = json.loads((folder / "out/study/study.json").read_text())
    assert [one["arm"] for one in runs] == ["dad", "source"] and "2/2: regions-dad-icfg-tiny-60-s0" in said
    for one in runs:
        assert set(one["results"]) == {"zero-shot", "tenth", "all"} and set(one["results"]["all"]) == {*study.TARGETS}
        assert all(0 <= one["results"]["all"]["icfg"]["embeddings"][f"{part} R@1"] <= 100 for part in ("twins", "rest"))
    dad, source = (one["labelled"] for one in runs)
    assert source["zero-shot"] == 0 and dad["zero-shot"] == source["all"] > source["tenth"] > 0
    table = (folder / "out/study/table.md").read_text()
    assert "| regions | dad | 1 |" in table and "R@1 on other targets" in table
    with Image.open(folder / "out/study/figure.png") as picture:
        assert picture.width > 500
    assert not list((folder / "out/study").glob("*-icfg-tiny-60-s0/*/*.safetensors"))       # only results are kept


def test_a_finished_run_is_not_made_again_and_a_wrong_arm_is_refused(quick):
    folder, _ = quick
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/study").glob("*/run.json")}
    said = succeed(folder, "mra/study.py", "--quick", "--images", "60")
    assert {path: path.stat().st_mtime_ns for path in before} == before and "2/2" not in said
    status, _, err = command(folder, "mra/study.py", "--arms", "nonsense")
    assert status == 2 and "--arms 'nonsense'" in err


@pytest.mark.parametrize("arm", ("source", "exact", "shuffled", "dad 50%"))
def test_every_arm_has_the_same_number_of_images(quick, arm, monkeypatch):
    folder, _ = quick
    monkeypatch.chdir(folder)
    made = study.image_set(study.Run(arm, "regions", "icfg", 0, 8, "tiny"), folder / "out/sets", 1.0, "none")
    rows = json.loads((made / "sda_0_5000.json").read_text())
    assert len(rows) == 10 and all((made / "imgs" / row["image"]).is_file() for row in rows)
    source = {record.captions[0] for record in load("sda", "train", folder / "data/demo-tiny", say=study.quiet).records}
    own = json.loads((made / "report.json").read_text())["own"]
    assert own == 8 if arm != "dad 50%" else 1 <= own <= 4
    assert sum(row["caption"] in source for row in rows) == (10 if arm == "source" else 10 - own)
