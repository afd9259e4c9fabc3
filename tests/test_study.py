"""The study: the quick version as a user runs it, every kind of image set, and the table from runs made by hand."""

import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Fresh
from test_commands import ROOT, command, succeed

from mra.formats.read import load
from mra.run import machine
from mra.town import sets
from mra.town.people import UPPERS
from tests.study import charts, comparisons, study, study_table
from tests.study.portraits import portraits

MAIN = "tests/study/__main__.py"        # python -m tests.study


def made_run(arm, target, seed, r1, losses="regions"):
    metrics = {"R@1": r1, "mAP": r1 / 2, "twins R@1": r1 - 5, "rest R@1": r1 + 2}
    return {"arm": arm, "losses": losses, "target": target, "seed": seed, "labelled": {"zero-shot": 0},
            "results": {"zero-shot": {target: {"embeddings": metrics, "re-ranked": metrics | {"R@1": r1 + 1}}}}}


def test_a_row_is_paired_with_source_and_exact_of_the_same_target_and_seed():
    runs = [made_run(arm, "icfg", seed, r1) for arm, figures in
            {"source": (10.0, 20.0), "exact": (50.0, 60.0), "dad": (40.0, 50.0)}.items()
            for seed, r1 in enumerate(figures)]
    runs += [made_run("source", "cuhk", 0, 90.0), made_run("source", "icfg", 0, 0.0, "pairs")]
    cells = comparisons.row(runs, "regions", "dad", "zero-shot")
    assert cells == {"losses": "regions", "arm": "dad", "runs": "2", "labelled pairs": "0", "R@1": "45.0 +- 7.1",
                     "mAP": "22.5 +- 3.5", "re-ranked R@1": "46.0 +- 7.1", "R@1 of twins": "40.0 +- 7.1",
                     "R@1 - source": "+30.0 [+30.0, +30.0]", "gap closed": "75 %"}
    assert comparisons.row(runs, "regions", "source", "zero-shot")["gap closed"] == "0 %"
    assert comparisons.row(runs, "regions", "exact", "zero-shot")["gap closed"] == "100 %"
    assert comparisons.row(runs, "pairs", "source", "zero-shot")["gap closed"] == ""
    runs += [made_run("exact", "icfg", 0, -1.0, "pairs")]
    assert comparisons.row(runs, "pairs", "exact", "zero-shot")["gap closed"] == ""


@pytest.mark.parametrize("gaps, closed", [((3.0, 5.0), "100 %"), ((3.0, 8.0), ""),      # 4 and 2.2 errors
                                          ((0.1,), ""), ((10.0,), ""), ((11.0,), "100 %")])     # one seed has no error
def test_no_share_is_told_of_a_gap_within_the_noise(gaps, closed):
    runs = [made_run(arm, "icfg", seed, 50 + gap * (arm == "exact")) for arm in ("source", "exact")
            for seed, gap in enumerate(gaps)]
    assert comparisons.row(runs, "regions", "exact", "zero-shot")["gap closed"] == closed


def test_a_gap_on_top_of_augmentation_has_ends_of_its_own():
    figures = {"source": 10.0, "exact": 50.0, "augmented": 40.0, "augmented dad": 48.0, "augmented exact": 60.0}
    runs = [made_run(arm, target, seed, r1) for arm, r1 in figures.items() for target in study.TARGETS
            for seed in range(3)]
    closed = [comparisons.row(runs, "regions", arm, "zero-shot").get("gap closed from augmented") for arm in figures]
    assert closed == [None, None, "0 %", "40 %", "100 %"]
    assert comparisons.row(runs, "regions", "augmented dad", "zero-shot")["gap closed"] == "95 %"
    assert study_table.with_augmentation(runs) == ""            # without `dad` there is no pair that all arms have
    runs += [made_run("dad", "icfg", 1, 45.0), made_run("dad", "cuhk", 2, 45.0)]
    for one in runs:
        one["results"] = dict.fromkeys(study.STAGES, one["results"]["zero-shot"])
    said = study_table.with_augmentation(runs)
    assert "(targets and seeds: cuhk 2, icfg 1)" in said
    for row in ("| `augmented dad` | with | 48.0 +- 0.0 |", "| augmented dad - augmented | +8.0, +8.0 |",
                "| R@1, `augmented dad`, from `source` to `exact` | 95 % |",
                "| mAP, `augmented dad`, from `augmented` to `augmented exact` | 40 % |"):
        assert row in said


def test_differences_are_of_the_runs_that_both_have():
    """By hand: seeds differ by 2 and 6 on the mean of two targets; the third target has no other side."""
    runs = [made_run("dad", target, seed, r1) for target, figures in
            {"icfg": (11.0, 17.0), "cuhk": (13.0, 15.0), "rstp": (99.0, 99.0)}.items()
            for seed, r1 in enumerate(figures)]
    runs += [made_run("dad", target, seed, 10.0, "pairs") for target in ("icfg", "cuhk") for seed in (0, 1)]
    pair = ("regions", "dad"), ("pairs", "dad")
    cells = comparisons.comparison(runs, *pair, "zero-shot")
    assert cells["runs"] == "4" and cells["R@1"] == "+4.0 [-21.4, +29.4]" == cells["R@1 of twins"]
    assert cells["mAP"] == "+2.0 [-10.7, +14.7]"
    assert comparisons.comparison(runs, pair[0], ("pairs", "source"), "zero-shot") == {}
    assert comparisons.comparison(runs, *pair, "all") == {}


def test_runs_weigh_the_same_while_a_seed_lacks_a_target():
    """Else seed 1 would lend its one target the weight of two; and a gap is that of what both sides have."""
    figures = {("cuhk", 0): 10.0, ("icfg", 0): 30.0, ("icfg", 1): 50.0}
    runs = [made_run("source", *key, r1) for key, r1 in figures.items()]
    runs += [made_run("exact", *key, r1 + 40) for key, r1 in figures.items()]
    runs += [made_run("dad", "cuhk", 0, 20.0), made_run("dad", "icfg", 1, 80.0)]
    assert comparisons.row(runs, "regions", "source", "zero-shot")["R@1"].startswith("30.0 +- ")
    cells = comparisons.row(runs, "regions", "dad", "zero-shot")
    assert cells["runs"] == "2" and cells["R@1 - source"].startswith("+20.0 [")
    assert cells["gap closed"] == "50 % [-268, 368]"       # of 10 and 30 of 40: -10 and 10 of it, an error of 10 of 40
    gains = {("cuhk", 0): 1.0, ("icfg", 0): 3.0, ("icfg", 1): 8.0}
    assert comparisons.interval(gains) == "+4.0 [-29.9, +37.9]"        # of (1 + 3 - 8) / 3 twice, t = 12.71


def test_other_targets_have_a_column_where_they_were_tested():
    run = made_run("dad", "icfg", 0, 40.0)
    run["results"]["zero-shot"] |= {"cuhk": {"embeddings": {"R@1": 10.0}}, "rstp": {"embeddings": {"R@1": 30.0}}}
    cells = comparisons.row([run], "regions", "dad", "zero-shot")
    assert cells["R@1 on other targets"] == "20.0"
    assert comparisons.as_table([{"losses": "pairs"}, cells]).splitlines()[2] == "| pairs |" + "  |" * (len(cells) - 1)


def test_arms_are_compared_on_what_all_have_run(tmp_path):
    arms = ("source", *study.SHARES, "dad")
    group = {arm: {("icfg", seed): made_run(arm, "icfg", seed, 10.0 * number + seed) for seed in (0, 1)}
             for number, arm in enumerate(arms)}
    del group["dad"]["icfg", 1]
    found = comparisons.comparable(group)
    assert found == dict(zip(arms, ([0.0], [10.0], [20.0], [30.0], [40.0])))
    charts.curve(dict(zip((0.0, 0.05, 0.25, 0.5, 1.0), found.values())), "R@1", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:       # the values at 25 and 50 %
        assert picture.getpixel((210, 190)) == picture.getpixel((360, 115)) == (30, 150, 60)
    assert comparisons.comparable(group | {"dad": {}})["source"] == [0.0, 1.0]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """Of five seeds and three targets, half of the variance being the seed's."""
    draw, inside = torch.Generator().manual_seed(0), 0
    for _ in range(500):
        own, shared = torch.randn(5, 3, generator=draw), torch.randn(5, 1, generator=draw)
        gains = {(target, seed): float(3 + own[seed, i] + shared[seed]) for i, target in enumerate(study.TARGETS)
                 for seed in range(5)}
        low, high = json.loads(comparisons.interval(gains).split(" ", 1)[1].replace("+", ""))
        inside += low <= 3 <= high
    assert 0.93 < inside / 500 < 0.97


def test_the_main_arms_come_on_three_targets_with_five_or_three_seeds_and_the_others_on_one_with_two():
    runs = list(study.plan(study.StudyConfig()))
    main = [one for one in runs if (one.arm, one.losses) in study.MAIN]
    augmented = [one for one in runs if (one.arm, one.losses) in study.MAIN_AUGMENTED]
    others = [one for one in runs if one not in main + augmented]
    assert len(augmented) == 3 * 3 * 3 and {one.seed for one in augmented} == {0, 1, 2}
    assert len(main) == 6 * 3 * 5 and len(others) == 2 * 16
    assert {one.arm for one in runs} == {*study.ARMS} - {"dad matched"} == {*study.MADE}
    assert {one.target for one in others} == {"icfg"} and {one.seed for one in others} == {0, 1}
    assert len({one.name for one in runs}) == len(runs)
    parts = [one.name for arm in study.ARMS for one in study.plan(study.StudyConfig(arms=(arm,)))]
    assert sorted(parts) == sorted(one.name for one in runs)        # split by arm, as many
    assert [one.name for one in study.plan(study.StudyConfig(arms=("dad",), targets=("rstp",), seeds=("7",)))] == [
        "regions-dad-rstp-demo-6000-s7", "pairs-dad-rstp-demo-6000-s7"]
    assert len(list(study.plan(study.StudyConfig(arms=("moments",), seeds=("2",))))) == 1


def in_process(script: str, *flags: str) -> None:
    """In place of `study.call`, whose processes take seconds to start: the study starts a dozen."""
    succeed(Path.cwd(), script, *flags)


@pytest.fixture(scope="module")
def quick(in_town):
    folder = in_town("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "call", in_process)
        return folder, succeed(folder, MAIN, "--quick")


def test_quick_runs_from_start_to_table(quick):
    folder, said = quick
    runs = json.loads((folder / "out/study/study.json").read_text())
    assert [one["arm"] for one in runs] == ["dad", "source"] and "2/2: regions-dad-icfg-tiny-60-s0" in said
    for one in runs:
        assert set(one["results"]) == {*study.STAGES} and set(one["results"]["all"]) == {*study.TARGETS}
        assert all(0 <= one["results"]["all"]["icfg"]["embeddings"][f"{part} R@1"] <= 100 for part in ("twins", "rest"))
    dad, source = (one["labelled"] for one in runs)
    assert source["zero-shot"] == 0 < dad["zero-shot after a tenth"] < dad["zero-shot"] < source["all"] == dad["all"]
    assert 0 < source["tenth"] == dad["tenth"] < source["all"]
    table = (folder / "out/study/table.md").read_text()
    assert "| regions | dad | 1 |" in table and "R@1 on other targets" in table
    assert "| regions and DaD - regions alone | zero-shot after a tenth | 1 |" in table
    assert {one["precision"] for one in runs} == {machine.Machine.of("", "").precision}
    with Image.open(folder / "out/study/figure.png") as picture:
        assert picture.width > 500
    assert not list((folder / "out/study").glob("*-icfg-tiny-60-s0/*/*.safetensors"))       # only results are kept
    key = json.loads((folder / "out/study/regions-dad-icfg-tiny-60-s0/run.key.json").read_text())
    assert key["arm"] == "dad" and key["steps"] == study.STEPS["tiny"] and key["rates"] == study.RATES
    sets = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("out/study/sets/*/report.key.json")}
    assert sets.keys() == {f"{name}-icfg-tiny-60-s0-{share}" for name, share in
                           (("source", "1"), ("dad", "1"), ("dad", "0.1"))}
    assert "--share 0.1" in sets["dad-icfg-tiny-60-s0-0.1"]["adapt.py"]


def test_a_run_with_other_rates_is_neither_finished_nor_in_the_table(quick, monkeypatch):
    folder, _ = quick
    one, said = study.Run("source", "regions", "icfg", 0, 60, "tiny"), []
    file = folder / "out/study" / one.name / "run.json"
    assert study.is_kept(file, one.key, said.append) and not said
    monkeypatch.setattr(study, "RATES", {"tenth": 1.0, "all": 4e-4})
    assert not study.is_kept(file, one.key, said.append)
    assert said == [f"{file} is made anew: rates.tenth was 0.0001 and is 1.0."]
    with pytest.raises(study.UserError, match="no finished run of size tiny with --images 60"):
        study.report(folder / "out/study", study.of_kind(one))


def test_a_finished_run_is_not_made_again_and_a_wrong_arm_is_refused(quick):
    folder, _ = quick
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/study").glob("*/run.json")}
    said = succeed(folder, MAIN, "--quick")
    assert {path: path.stat().st_mtime_ns for path in before} == before and "2/2" not in said
    for flags in (("--arms", "nonsense"), ("--arms", "dad matched"), ("--images", "2"), ("--quick", "--seeds", "1")):
        status, _, err = command(folder, MAIN, *flags)
        assert status == 2 and flags[0] in err and flags[1] in err and err.count("\n") == 1
        assert flags[0] != "--arms" or all(arm in err for arm in study.MADE)


@pytest.mark.parametrize("arm", ("source", "reinhard", "exact", "worlds", "shuffled", "dad 50%"))
def test_every_arm_has_as_many_images_of_one_resolution(quick, arm, monkeypatch):
    folder, _ = quick
    monkeypatch.setattr(study, "call", in_process)
    monkeypatch.chdir(folder)
    made = study.image_set(study.Run(arm, "regions", "icfg", 0, 12, "tiny"), folder / "out/sets", 1.0)
    rows = json.loads((made / "sda_0_5000.json").read_text())
    assert len(rows) == 10                                                      # 2/3 of 12 and a quarter of that
    for row in rows:
        with Image.open(made / "imgs" / row["image"]) as image:
            assert image.size == (16, 32)
    source = {record.captions[0]: record for record in load("sda", "train", folder / "data/demo-tiny",
                                                            say=study.quiet).records}
    own = json.loads((made / "report.json").read_text())["own"]
    assert own == {"source": 0, "dad 50%": 4}.get(arm, 8)
    true = [row["caption"] in source and row["image_id"] == source[row["caption"]].identity for row in rows]
    if arm == "shuffled":
        assert sum(true) <= 2 and sum(row["caption"] in source for row in rows) == 2
    else:
        assert sum(true) == (10 if arm == "reinhard" else 10 - own)
    monkeypatch.setattr(study, "make_set", None)            # it is there: another run with the same images finds it
    assert study.image_set(study.Run(arm, "pairs", "icfg", 0, 12, "tiny"), folder / "out/sets", 1.0) == made


def test_an_arm_with_augmentation_has_the_images_of_its_arm_without(quick, monkeypatch):
    """Nothing is made: `quick` has made the sets of `source` and `dad`."""
    folder, _ = quick
    monkeypatch.chdir(folder)
    monkeypatch.setattr(study, "make_set", None)
    for arm, share, name in (("augmented", 1.0, "source-icfg-tiny-60-s0-1"),
                             ("augmented dad", 1.0, "dad-icfg-tiny-60-s0-1"),
                             ("augmented dad", 0.1, "dad-icfg-tiny-60-s0-0.1")):
        one = study.Run(arm, "regions", "icfg", 0, 60, "tiny")
        assert study.image_set(one, Path("out/study"), share) == Path("out/study/sets") / name
    assert [arm for arm in study.AUGMENTED if study.learns(arm)] == ["augmented dad"]


@pytest.mark.parametrize("arm, first, in_first, in_mix", [
    ("exact", "regions-tiny-s0", False, False), ("worlds", "regions-tiny-s0", False, False),
    ("augmented", "regions-augmented-tiny-s0", True, True),
    ("augmented dad", "regions-augmented-tiny-s0", True, False),
    ("augmented exact", "regions-augmented-tiny-s0", True, False)])
def test_augmentation_stays_in_the_sources_stage(arm, first, in_first, in_mix, monkeypatch):
    calls, one = [], study.Run(arm, "regions", "icfg", 0, 60, "tiny")
    monkeypatch.setattr(study, "image_set", lambda one, out, share: "images")
    monkeypatch.setattr(study, "call", lambda *flags: calls.append(" ".join(flags)))
    study.pretrained(one, Path("out"), 1.0)
    source, mix = calls
    assert "--dataset sda" in source and f"--out out/first/{first} --init none" in source
    assert "--dataset images" in mix and f"--out out/{one.name}/mix-1 --init out/first/{first}/best" in mix
    assert ["--light 0.75" in said for said in calls] == [in_first, in_mix] == ["--light" in said for said in calls]
    assert one.key.get("light") == ("0.75" if in_first else None)


def test_worlds_show_the_sources_people_otherwise(quick, monkeypatch):
    """Row by row the same people as in the set of `source`; the caption names what they wear, in a world each."""
    folder, _ = quick
    monkeypatch.chdir(folder)
    made = {arm: study.image_set(study.Run(arm, "regions", "icfg", 0, 60, "tiny"), Path("out/study"), 1.0)
            for arm in ("source", "worlds")}
    plain, drawn = (json.loads((path / "sda_0_5000.json").read_text()) for path in made.values())
    own = json.loads((made["worlds"] / "report.json").read_text())["own"]
    assert own == 8 and [row["image_id"] for row in plain] == [row["image_id"] for row in drawn]
    shots = {shot.path: shot for shot in sets.shots("source", sets.TINY["source"], 0)}
    persons = {record.captions[0]: shots[record.path.split("/imgs/")[1]].person
               for record in load("sda", "train", folder / "data/demo-tiny", say=study.quiet).records}
    people = [persons[row["caption"]] for row in plain[:own]]
    expected = portraits("worlds", people, 7, (32, 16), 1)
    assert len({one.camera for one in expected}) == own and min(one.camera for one in expected) > 7     # no camera
    for before, row, person, portrait in zip(plain, drawn, people, expected):
        assert any(name in row["caption"] for name in UPPERS[person.upper])
        assert len(row["phrases"]) == len(row["boxes"]) >= 3
        with Image.open(made["source"] / "imgs" / before["image"]) as first, \
                Image.open(made["worlds"] / "imgs" / row["image"]) as second:
            assert np.array_equal(second, portrait.pixels)
            assert np.abs(np.asarray(first, float) - np.asarray(second, float)).mean() > 10     # of 255


def test_an_image_set_of_another_making_is_made_anew(quick, monkeypatch, capsys):
    folder, _ = quick
    monkeypatch.chdir(folder)
    one = study.Run("exact", "regions", "icfg", 1, 6, "tiny")
    made = study.image_set(one, folder / "out/anew", 1.0)
    assert json.loads((made / "report.json").read_text()) == {"own": 4, "images": 5}
    (made / "imgs/stale.png").write_text("of another making")
    monkeypatch.setattr(study, "SOURCE_SHARE", 0.5)
    assert study.image_set(one, folder / "out/anew", 1.0) == made
    assert "source share was 0.25 and is 0.5" in capsys.readouterr().out
    rows = json.loads((made / "sda_0_5000.json").read_text())
    assert len(rows) == 6 and {path.name for path in (made / "imgs").iterdir()} == {row["image"] for row in rows}


def test_a_terminals_interrupt_reaches_a_script_twice_and_it_still_saves(tmp_path):
    """Ctrl-C goes to the study and to the script that it runs; the study tells the script once more."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    (tmp_path / "script.py").write_text(
        "import time\nfrom pathlib import Path\nfrom mra.run.machine import stoppable\n"
        f"with stoppable() as asked:\n    Path({str(ready)!r}).touch()\n"
        "    while not asked.is_set():\n        time.sleep(0.01)\n"
        f"    time.sleep(1)\n    Path({str(saved)!r}).touch()\n")
    studying = Fresh(tmp_path, tmp_path, study_calls, str(tmp_path / "script.py"), PYTHONPATH=str(ROOT))
    studying.until(ready.exists)
    studying.interrupt()
    assert studying.status() and "KeyboardInterrupt" in studying.err and saved.exists()


def study_calls(script: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    study.call(script)


def test_what_another_process_makes_is_waited_for(monkeypatch, tmp_path):
    """The first try meets a run that writes there, the second does not; other errors are told."""
    script, naps = tmp_path / "script.py", []
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: naps.append(script.write_text("")))
    script.write_text("import sys; sys.exit('out: another run is writing there; wait')")
    study.call("script.py")
    assert len(naps) == 1
    script.write_text("import sys; sys.exit('out: broken')")
    with pytest.raises(study.UserError, match="script.py failed: out: broken"):
        study.call("script.py")


def test_the_same_run_is_not_made_by_two_processes_at_once(monkeypatch, tmp_path, capsys):
    """The second process goes on with the next run, so that several share out all of them."""
    made = []
    monkeypatch.setattr(study, "perform", lambda one, out: made.append(one.arm) or {})
    monkeypatch.setattr(study, "report", lambda out, kind: None)
    monkeypatch.setattr(sys, "argv", ["study", "--quick", "--out", str(tmp_path)])
    with machine.locked(tmp_path / "regions-source-icfg-tiny-60-s0", machine.Machine.of("cpu", "float32")):
        study.main()
    assert made == ["dad"] and "regions-source-icfg-tiny-60-s0 is being made by another" in capsys.readouterr().out
    study.main()
    assert made == ["dad", "source"]            # dad is finished


def test_images_that_another_process_makes_are_waited_for(tmp_path):
    """flock is of an open file, so that threads stand for processes."""
    order, lock = [], tmp_path / "sets/one.lock"

    def second() -> None:
        with study.alone(lock):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with study.alone(lock):
            waiting = pool.submit(second)
            time.sleep(0.2)
            order.append("first")
        waiting.result(10)
    assert order == ["first", "second"]


def test_checkpoints_go_only_after_the_results_are_written(monkeypatch, tmp_path):
    """And go later where a run was killed in between."""
    one, here = study.Run("source", "regions", "icfg", 0, 60, "tiny"), machine.Machine.of("cpu", "float32")
    stage = tmp_path / one.name / "mix-1"

    def perform(one, out) -> dict:
        stage.mkdir(exist_ok=True)
        return {"results": {}}

    def killed(path, key):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "perform", perform)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study, "remember", killed)
        study.make(one, tmp_path, "1/1", here)
    assert stage.exists()
    study.make(one, tmp_path, "1/1", here)
    assert not stage.exists()
    stage.mkdir()
    study.make(one, tmp_path, "1/1", here)
    assert not stage.exists() and (tmp_path / one.name / "run.json").exists()


def test_the_written_tables_are_of_the_runs(capsys):
    """tables.md is what study_table.py prints of runs.json, and the README has those of its main arms."""
    folder = ROOT / "tests/study"
    study_table.main(str(folder / "runs.json"))
    said = capsys.readouterr().out
    assert said == (folder / "tables.md").read_text()
    readme = (folder / "README.md").read_text()
    tables = [part for part in said.split("## Each target")[0].split("\n\n") if part.startswith("|")]
    assert len(tables) == 3 and all(f"\n\n{part.strip()}\n\n" in readme for part in tables)
    assert f"Run so far: {said.splitlines()[0][:-1]}**" in readme


def test_runs_that_cannot_be_made_any_more_count_as_finished_ones():
    runs = json.loads((ROOT / "tests/study/runs.json").read_text())
    assert study_table.count(runs) == "126 of 126 runs."
    others = [one for one in runs if one["arm"] != "dad matched"]
    assert study_table.count(others) == "124 of 124 runs."
    assert study_table.count([one for one in others if one["arm"] != "none"]) == "122 of 124 runs."


def test_the_arms_that_came_later_are_counted_apart():
    runs = json.loads((ROOT / "tests/study/runs.json").read_text())
    later = [made_run("augmented dad", "rstp", 2, 1.0), made_run("worlds", "icfg", 1, 1.0)]
    assert study_table.count(runs + later) == "126 of 126 runs, and 2 of 29 of the arms that came later."
