"""The two commands from end to end on the tiny preset, in an empty folder, as a user types them."""

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from mra import losses, ranking
from mra.config import PRESETS, TrainConfig, UserError, pretrains, recipe
from mra.data.tokenizer import VOCAB_FILE
from mra.retriever import Retriever
from mra.run import checkpoint, machine, stages
from mra.run.command import run

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--preset", "tiny")
QUICK = (*TINY, "--init", "none", "--steps", "2", "--batch", "4", "--evals", "1")    # no pretraining
BEST = "out/icfg-tiny-s0/best.safetensors"


class Ran(NamedTuple):
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


def command(folder: Path, script: str, *flags: str) -> Ran:
    """`python <script> <flags>` with `folder` as working directory, in this process; exceptions pass through."""
    out, err, before, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [script, *flags]
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    return Ran(status, out.getvalue(), err.getvalue())


def succeed(folder: Path, script: str, *flags: str) -> str:
    """What a command printed that must not fail."""
    status, out, err = command(folder, script, *flags)
    assert (status, err) == (0, "")
    return out


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def rows_of(out: str) -> dict[str, list[float]]:
    """The printed metrics by '<set> <stage>'."""
    return {name: [float(x) for x in numbers.split()] for name, numbers
            in re.findall(r"^(\w+ (?:embeddings|re-ranked))((?: +\d+\.\d\d){5})$", out, re.M)}


@pytest.fixture(scope="module")
def first(in_town, tmp_path_factory) -> tuple[Path, str]:
    """A folder where `train.py --dataset icfg` ran once, and what it printed. Not to be changed.

    The sets that it did not draw are there, too.
    """
    folder, others = tmp_path_factory.mktemp("work"), in_town("others")
    out = succeed(folder, "train.py", "--dataset", "icfg", *TINY)
    for name in ("CUHK-PEDES", "RSTPReid"):
        shutil.copytree(others / "data/demo-tiny" / name, folder / "data/demo-tiny" / name)
    return folder, out


@pytest.fixture
def work(first, tmp_path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(first[0], tmp_path / "work"))


@pytest.fixture(scope="module")
def photos(first, tmp_path_factory) -> Path:
    """A user's folder of images, some of them nested."""
    folder = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(sorted((first[0] / "data/demo-tiny/ICFG-PEDES/imgs").rglob("*.jpg"))[:5]):
        target = folder / ("nested/deep" if number % 2 else ".") / f"{number}.{'JPG' if number else 'jpg'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "notes.txt").write_text("no image")
    return folder


# ---- train.py

def test_the_demo_draws_pretrains_and_fine_tunes(first):
    folder, out = first
    said = ("Stage 1 of 2: training on sda.", "data/demo-tiny/SDA: drawing demo data",
            "not photographs", "'sda' train:", "Starting from random weights",
            "out/sda-tiny-s0/best.safetensors is ready",
            "data/demo-tiny/ICFG-PEDES: drawing demo data", "'icfg' train:",
            "Starting from out/sda-tiny-s0/best.safetensors, trained on sda", "val at step",
            "out/icfg-tiny-s0/best.safetensors is ready")
    places = [out.find(words) for words in said]
    assert -1 not in places and places[0] == min(places) and places[-1] == max(places)
    best = re.findall(r"^Best on val: (.*)", out, re.M)
    worth = out[out.index("On icfg val, before and after each stage:"):].splitlines()[1:]
    assert worth[0].endswith("  out/sda-tiny-s0/best.safetensors")
    assert worth[1:] == [f"{best[-1]}  out/icfg-tiny-s0/best.safetensors"]
    for name, pretrained_on, terms in (("icfg", "sda", {"itc", "itm", "mlm"}),
                                       ("sda", "nothing", {"itc", "itm", "mlm", "rpc", "rpm"})):
        out = folder / f"out/{name}-tiny-s0"
        assert {path.name for path in out.iterdir()} == {".lock", "best.safetensors", "last.safetensors", "log.jsonl"}
        lines = log_of(out)
        assert terms <= lines[-2].keys() and lines[-1]["val"]["reranked"].keys() >= {"R@1", "mAP"}
        best, facts = checkpoint.load(out / "best.safetensors")
        last, state = checkpoint.load(out / "last.safetensors")
        assert facts["pretrained_on"] == pretrained_on and facts["train"]["dataset"] == name
        assert state["step"] == lines[-1]["step"] and best.keys() < last.keys()


def test_a_second_call_goes_on_where_there_is_nothing_left_to_do(work):
    before = {path: path.read_bytes() for path in work.rglob("*.*") if path.is_file()}
    out = succeed(work, "train.py", "--dataset", "icfg", *TINY)
    for name in ("sda", "icfg"):
        assert re.search(rf"Found out/{name}-tiny-s0/last.safetensors: going on after step (\d+) of \1\.", out)
    assert "val at step" not in out and f"{BEST} is ready" in out
    assert before == {path: path.read_bytes() for path in work.rglob("*.*") if path.is_file()}
    (work / BEST).unlink()
    assert "best.safetensors that is gone" in refused(work, "train.py", "--dataset", "icfg", *TINY)


def test_no_resume_trains_again(work):
    flags = ("--dataset", "icfg", *TINY, "--init", "out/sda-tiny-s0/best.safetensors")
    assert "going on" not in succeed(work, "train.py", *flags, "--no-resume", "--lr", "1e-5")
    path = work / "out/icfg-tiny-s0-from-sda-tiny-s0/best.safetensors"
    assert checkpoint.load(path)[1]["train"]["lr"] == 1e-5


@pytest.mark.parametrize("flags, terms", [
    (("--dataset", "sda"), {"itc", "itm", "mlm", "rpc", "rpm"}),
    (("--dataset", "sda", "--no-regions"), {"itc", "itm", "mlm"}),
    (("--dataset", "sda", "--fusion-from", "1"), {"itc", "rpc", "rpm"}),
    (("--dataset", "icfg", "--share", "0.5"), {"itc", "itm", "mlm"}),
    (("--dataset", "icfg", "--accumulate", "2"), {"itc", "itm", "mlm"}),
    (("--dataset", "cuhk", "--eda", "0.8", "--erase", "0.6", "--smoothing", "0.2"), {"itc", "itm", "mlm"}),
    (("--dataset", "rstp", "--precision", "bf16", "--workers", "1"), {"itc", "itm", "mlm"}),
])
def test_flags_of_training(work, flags, terms):
    out = succeed(work, "train.py", *QUICK, *flags, "--out", "out/new")
    lines = log_of(work / "out/new")
    assert lines[-2].keys() - {"step", "lr", "images_per_second", "gradient", "loss"} == terms
    assert lines[-1]["step"] == 2
    assert "out/new/best.safetensors is ready" in out
    facts = checkpoint.load(work / "out/new/best.safetensors")[1]
    whole = {"sda": 10, "icfg": 13, "cuhk": 24, "rstp": 24}[flags[1]]
    assert 1 < facts["pairs"] < 10 if "--share" in flags else facts["pairs"] == whole
    assert "embeddings" in succeed(work, "evaluate.py") and (work / "out/new/results.json").exists()


def test_a_compiled_model_trains_alike(work, monkeypatch):
    """With the back end that generates no code, so that no C++ compiler is needed, and without dropout and threads."""
    real, calls = torch.compile, []
    monkeypatch.setattr(machine, "THREADS", 1)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], dropout=0.0))
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or real(model, backend="eager"))
    for flag in ("--compile", "--no-compile"):
        succeed(work, "train.py", *QUICK, "--dataset", "icfg", "--precision", "float32", flag, "--out", f"out/{flag}")
    one, other = (checkpoint.load(work / f"out/{flag}/last.safetensors")[0] for flag in ("--compile", "--no-compile"))
    assert len(calls) == 1 and one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)


def test_another_vocabulary_travels_with_the_checkpoint(work):
    words = VOCAB_FILE.read_text(encoding="utf-8").splitlines()[:-7]
    (work / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    succeed(work, "train.py", *QUICK, "--dataset", "icfg", "--vocab", "words.txt", "--out", "out/new")
    (work / "words.txt").unlink()
    tensors, facts = checkpoint.load(work / "out/new/best.safetensors")
    assert facts["vocab"] == words and len(tensors["text_encoder.words.weight"]) == len(words)
    assert "embeddings" in succeed(work, "evaluate.py", "--checkpoint", "out/new/best.safetensors")


def test_another_vocabulary_goes_through_both_stages(work, tmp_path):
    (tmp_path / "data").symlink_to(work / "data")
    flags = ("--dataset", "icfg", *TINY, "--vocab", str(VOCAB_FILE))
    assert "Starting from out/sda-tiny-s0/best.safetensors" in succeed(tmp_path, "train.py", *flags)
    assert "val at step" not in succeed(tmp_path, "train.py", *flags)


def test_mals_has_captions_and_no_boxes(work):
    images = sorted((work / "data/demo-tiny/SDA/imgs").rglob("*.jpg"))[:8]
    for part, some in enumerate((images[:4], images[4:])):
        records = []
        for number, image in enumerate(some):
            path = f"gene_crop/{part}/{number}.jpg"
            (work / "real/MALS" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, work / "real/MALS" / path)
            records.append({"image": path, "caption": "A man in a blue coat.", "image_id": f"{part}_{number}"})
        (work / f"real/MALS/g_{part}_attrs.json").write_text(json.dumps(records))
    out = succeed(work, "train.py", *QUICK, "--dataset", "mals", "--data-root", "real")
    assert "'mals' train: 7 images" in out and "'mals' val: 1 images" in out and "drawing demo data" not in out
    assert log_of(work / "out/mals-tiny-s0")[0].keys() >= {"itc", "itm", "mlm"}
    assert not log_of(work / "out/mals-tiny-s0")[0].keys() & {"rpc", "rpm"}


def own_set(folder: Path, town: Path) -> None:
    """A user's set in the processed format: train has a record per caption, val and test one per image."""
    (folder / "imgs").mkdir(parents=True)
    for split in ("train", "val", "test"):
        records = []
        for number, image in enumerate(sorted((town / "ICFG-PEDES/imgs").rglob("*.jpg"))[:6]):
            shutil.copy(image, folder / "imgs" / f"{split}{number}.jpg")
            captions = [f"Person {number} wears a red coat.", f"A {split} picture."]
            records += [{"image": f"{split}{number}.jpg", "image_id": number // 2, "caption": caption}
                        for caption in (captions if split == "train" else [captions])]
        (folder / f"{split}.json").write_text(json.dumps(records))


def test_a_folder_of_ones_own_is_a_data_set(work):
    own_set(work / "mine/set", work / "data/demo-tiny")
    out = succeed(work, "train.py", "--dataset", "mine/set", *TINY, "--epochs", "1")
    assert "Found out/sda-tiny-s0/last.safetensors" in out and "'mine/set' train: 6 images, 12 captions" in out
    assert "mine/set-tiny" not in out
    out = succeed(work, "evaluate.py")
    assert "trained on mine/set, pretrained on sda" in out and "'mine/set' test: 6 images, 12 captions" in out
    results = json.loads(Path(work, re.search(r"^Wrote (\S+results.json)", out, re.M)[1]).read_text())
    assert results["results"]["mine/set"]["queries"] == 12


def adapted_pairs(work: Path) -> None:
    """Source pairs in the target's look: SDA-format annotations, images, and the report that completes them."""
    source, target = work / "data/demo-tiny/SDA", work / "out/sda/icfg-tiny"
    shutil.copytree(source / "imgs", target / "imgs")
    for file in source.glob("sda_*.json"):
        shutil.copy(file, target)
    (target / "report.json").write_text('{"pairs": 12}\n')


def test_adapted_pairs_come_before_the_plain_source(work):
    adapted_pairs(work)
    out = succeed(work, "train.py", "--dataset", "icfg", *TINY, "--out", "out/new")
    assert "Stage 2 of 3: training on out/sda/icfg-tiny." in out
    assert "Starting from out/sda-tiny-s0/best.safetensors, trained on sda" in out
    start = re.search(r"^Starting from (\S+), trained on out/sda/icfg-tiny", out, re.M)[1]
    assert log_of((work / start).parent)[-2].keys() >= {"rpc", "rpm"}
    assert "pretrained on out/sda/icfg-tiny" in succeed(work, "evaluate.py", "--checkpoint", "out/new/best.safetensors")
    assert json.loads((work / "out/new/results.json").read_text())["pretrained_on"] == "out/sda/icfg-tiny"
    assert (work / "out/icfg-tiny-s0/best.safetensors").exists()     # made before; adapted ones go elsewhere
    assert "out/icfg-tiny-s0-adapted/best" in succeed(work, "train.py", "--dataset", "icfg", *TINY, "--steps", "1")
    (work / "out/sda/icfg-tiny/report.json").write_text('{"pairs": 12, "made": "anew"}')
    status, _, err = command(work, "train.py", "--dataset", "icfg", *TINY, "--steps", "1")
    assert status == 2 and "the content of the adapted set has changed" in err
    out = succeed(work, "train.py", "--dataset", "cuhk", *TINY, "--steps", "1")      # adapted to another set
    assert "Stage 1 of 2: training on sda." in out
    out = succeed(work, "train.py", "--dataset", "out/sda/icfg-tiny", *TINY, "--steps", "1", "--out", "out/direct")
    assert "Stage" not in out and "Starting from random weights" in out
    assert log_of(work / "out/direct")[0].keys() >= {"rpc", "rpm"}


def test_a_fine_tuning_starts_from_the_shipped_retriever(work, tmp_path, monkeypatch):
    """Unless another pretraining is asked for; an adapted set comes in between."""
    succeed(work, "train.py", "--dataset", "sda", *TINY, "--steps", "2", "--out", "out/made", "--half", "--light", "1")
    made = work / "out/made/best.safetensors"
    assert {tensor.dtype for tensor in checkpoint.load(made)[0].values()} == {torch.float16}
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    shutil.copy(made, shipped / "tiny.safetensors")
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    one = (*TINY, "--steps", "1", "--dataset", "icfg")
    out = succeed(work, "train.py", *one, "--seed", "5")
    assert "Stage" not in out and re.search(r"^Starting from \S*shipped/tiny.safetensors, trained on sda", out, re.M)
    facts = checkpoint.load(work / "out/icfg-tiny-s5/best.safetensors")[1]
    assert facts["train"]["init"].endswith("shipped/tiny.safetensors") and facts["pretrained_on"] == "sda"
    for flags in (("--init", "scratch"), ("--no-regions",), ("--beta", "0.5", "--seed", "7")):
        out = succeed(work, "train.py", *one, *flags, "--out", f"out/anew{flags[0]}")
        assert "Stage 1 of 2: training on sda." in out
    adapted_pairs(work)
    out = succeed(work, "train.py", *one[:-1], "out/sda/icfg-tiny", "--seed", "3")      # without a fine-tuning
    assert "Stage" not in out and '"lr": 0.0004' in out and "shipped/tiny.safetensors, trained on sda" in out
    assert "out/sda-icfg-tiny-tiny-s3-from-shipped/best.safetensors is ready" in out
    out = succeed(work, "train.py", *one)
    assert "Stage 1 of 2: training on out/sda/icfg-tiny." in out and "shipped/tiny.safetensors, trained on sda" in out
    assert "out/icfg-tiny-s0-adapted/best.safetensors is ready" in out
    assert re.search(r"icfg val, .*:\n.*/shipped/tiny.safetensors\n.*\n.* out/icfg-tiny-s0-adapted/best.safetensors$",
                     out)


def test_a_run_goes_on_with_the_same_content_alone(work):
    """Changed weights or records are told, by whatever path they are named; moved ones go on."""
    flags = (*TINY, "--steps", "2", "--out", "out/fine")
    succeed(work, "train.py", "--dataset", "sda", *TINY, "--steps", "2", "--out", "out/P")
    succeed(work, "train.py", "--dataset", "icfg", "--init", "out/P/best.safetensors", *flags)
    assert "step 2 of 2" in succeed(work, "train.py", "--dataset", "icfg", "--init", "./out/P/best.safetensors", *flags)
    succeed(work, "train.py", "--dataset", "sda", *TINY, "--steps", "3", "--out", "out/P", "--no-resume")
    message = refused(work, "train.py", "--dataset", "icfg", "--init", "out/P/best.safetensors", *flags)
    assert "content of the first weights (--init, --bert, --vit, --clip) has changed" in message
    own, flags = work / "own", (*TINY, "--init", "none", "--steps", "2", "--out", "out/own")
    own.mkdir()
    records = [{"image": f"imgs/{i}.jpg", "caption": f"a red coat {i}", "image_id": i // 2} for i in range(24)]
    source = sorted((work / "data/demo-tiny/SDA").rglob("*.jpg"))
    (own / "imgs").mkdir()
    for record, image in zip(records, source):
        shutil.copy(image, own / record["image"])
    (own / "train.json").write_text(json.dumps(records))
    succeed(work, "train.py", "--dataset", "own", *flags)
    succeed(work, "train.py", "--dataset", "sda", *TINY, "--steps", "2", "--out", "out/Q")
    (work / "elsewhere").mkdir()
    own.rename(work / "elsewhere/mine")
    assert "going on after step 2 of 2" in succeed(work, "train.py", "--dataset", "./elsewhere/mine/", *flags)
    said = succeed(work, "evaluate.py", "--dataset", "elsewhere/mine", "--split", "train", "--k", "0")
    assert "out/own/best.safetensors: trained on" in said       # the run asked for last, not the newest training
    file = work / "elsewhere/mine/train.json"
    file.write_text(file.read_text().replace("red coat", "green dress"))
    message = refused(work, "train.py", "--dataset", "elsewhere/mine", *flags)
    assert "content of the train records has changed" in message


def test_a_share_of_the_first_weights_stays_in_the_best_ones(work):
    """--blend changes what is judged and kept, not the training, which the state of both runs shows."""
    flags = ("--dataset", "icfg", *TINY, "--init", BEST, "--steps", "4", "--batch", "4", "--evals", "2")
    kept = {}
    for share in ("0", "0.25"):
        succeed(work, "train.py", *flags, "--blend", share, "--out", f"out/blend-{share}")
        for name in ("best", "last"):
            kept[name, share], facts = checkpoint.load(work / f"out/blend-{share}/{name}.safetensors")
            assert facts["step"] == 4
    before, _ = checkpoint.load(work / BEST)
    for name, start in before.items():
        trained = kept["best", "0"][name]
        assert torch.equal(kept["last", "0.25"][name], kept["last", "0"][name])
        assert torch.allclose(kept["best", "0.25"][name], start + 0.75 * (trained - start), atol=1e-6)
    assert not torch.equal(kept["best", "0.25"]["word_head.transform.0.weight"], before["word_head.transform.0.weight"])
    assert "--blend is a share of first weights" in refused(work, "train.py", *QUICK, "--blend", "0.5")


def test_adapted_pairs_without_a_report_are_not_complete(work):
    adapted_pairs(work)
    (work / "out/sda/icfg-tiny/report.json").unlink()
    assert "Stage 1 of 2: training on sda." in succeed(work, "train.py", "--dataset", "icfg", *TINY)


def test_a_set_that_is_just_begun_is_not_passed_over(work):
    adapted_pairs(work)
    (work / "out/sda/icfg-tiny/report.json").unlink()
    (work / "out/sda/icfg-tiny/parts.key.json").write_text("{}")        # adapt.py writes it before it learns anything
    assert "is an adapted set that is not finished" in refused(work, "train.py", "--dataset", "icfg", *TINY)


def test_best_weights_without_their_run_are_not_overwritten(work):
    best, flags = work / BEST, ("--dataset", "icfg", *QUICK, "--out", str((work / BEST).parent))
    before = best.read_bytes()
    best.with_name("last.safetensors").unlink()
    assert "is of a run that cannot go on" in refused(work, "train.py", *flags)
    assert best.read_bytes() == before
    succeed(work, "train.py", *flags, "--no-resume")
    assert best.read_bytes() != before


def test_adapted_pairs_are_those_of_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("icfg", "icfg-small"):
        (tmp_path / "out/sda" / name).mkdir(parents=True)
        (tmp_path / "out/sda" / name / "report.json").write_text("{}")
    for preset, name in (("demo", "icfg"), ("small", "icfg-small"), ("base", None)):
        assert stages.adapted_set(TrainConfig(preset=preset)) == (name and Path("out/sda", name))
    assert stages.adapted_set(TrainConfig(share=0.1)) is None       # icfg was made from all labels
    (tmp_path / "out/sda/icfg").rename(tmp_path / "out/sda/icfg-0.1")
    assert stages.adapted_set(TrainConfig(share=0.1)) == Path("out/sda/icfg-0.1")


def test_a_known_name_is_never_a_folder(tmp_path, monkeypatch):
    (tmp_path / "icfg").mkdir()
    (tmp_path / "icfg/sda_0.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    assert not pretrains("icfg") and recipe("icfg", "tiny") == recipe("cuhk", "tiny")
    assert pretrains("./icfg")


# ---- evaluate.py

def test_evaluate_finds_the_newest_checkpoint(work):
    out = succeed(work, "evaluate.py")
    assert f"{BEST}: trained on icfg, pretrained on sda, seed 0" in out
    rows = rows_of(out)
    assert rows.keys() == {"icfg embeddings", "icfg re-ranked"}
    results = json.loads((work / "out/icfg-tiny-s0/results.json").read_text())
    assert results.keys() >= {"results", "evaluation", "train", "checkpoint", "versions", "pretrained_on"}
    assert results["pretrained_on"] == "sda" and results["train"]["seed"] == 0
    used = {"k": 8, "mirror": True, "weight": results["evaluation"]["weight"], "dataset": ["icfg"], "device": "cpu",
            "precision": "float32"}
    assert used.items() <= results["evaluation"].items() and used["weight"] in ranking.WEIGHTS
    found = results["results"]["icfg"]
    assert (found["queries"], found["gallery"], found["identities"]) == (18, 18, 6) and found["seconds"] >= 0
    for stage in ("embeddings", "re-ranked"):
        assert [round(found[stage][name], 2) for name in ("R@1", "R@5", "R@10", "mAP", "mINP")] == rows[f"icfg {stage}"]
    with Image.open(work / "out/icfg-tiny-s0/ranking.png") as picture:
        picture.load()
        assert picture.width > 900 and picture.height > 1000 and len(set(picture.convert("L").tobytes())) > 50


def test_val_is_ranked_as_the_test_split_is(work, monkeypatch):
    """With mirror images: the weight of the similarity is chosen where it is used."""
    real, given = ranking.search, []

    def search(model, tokenizer, captions, paths, settings, *more):
        given.append(settings)
        return real(model, tokenizer, captions, paths, settings, *more)
    monkeypatch.setattr(ranking, "search", search)
    succeed(work, "train.py", "--dataset", "icfg", *QUICK, "--out", "out/new")
    succeed(work, "evaluate.py")
    assert len(given) == 2 and all(one.mirror for one in given)


def test_a_run_that_has_not_ended_is_told(work, monkeypatch):
    """Its best checkpoint may be that of the run before."""
    real, calls = losses.total, []

    def kill(terms, beta):
        calls.append(beta)
        if len(calls) == 2 * 2 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(terms, beta)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "total", kill)
        flags = (*QUICK, "--steps", "9", "--no-resume", "--out", "out/icfg-tiny-s0")
        status, _, _ = command(work, "train.py", "--dataset", "icfg", *flags)
    assert status == 130
    assert "last.safetensors is of a run that has not ended" in succeed(work, "evaluate.py", "--k", "0")


def test_cross_domain_rows(work):
    rows = rows_of(succeed(work, "evaluate.py", "--dataset", "cuhk", "rstp", "--checkpoint", BEST, "--out", "rows"))
    assert list(rows) == ["cuhk embeddings", "cuhk re-ranked", "rstp embeddings", "rstp re-ranked"]
    assert json.loads((work / "rows/results-cuhk-rstp.json").read_text())["results"].keys() == {"cuhk", "rstp"}
    assert (work / "rows/ranking-cuhk-rstp.png").exists() and not (work / "out/icfg-tiny-s0/results.json").exists()


def test_flags_of_evaluation(work):
    plain = rows_of(succeed(work, "evaluate.py"))
    nothing = rows_of(succeed(work, "evaluate.py", "--k", "0"))
    assert nothing == {"icfg embeddings": plain["icfg embeddings"]}
    every = rows_of(succeed(work, "evaluate.py", "--k", "10000"))
    assert every == rows_of(succeed(work, "evaluate.py", "--k", "18", "--batch", "5", "--workers", "1"))
    alone = rows_of(succeed(work, "evaluate.py", "--no-mirror", "--weight", "1"))
    assert alone.keys() == plain.keys()
    results = work / "out/icfg-tiny-s0"
    used = json.loads((results / "results-mirror-False-weight-1.0.json").read_text())["evaluation"]
    assert (used["weight"], used["mirror"]) == (1.0, False)
    assert json.loads((results / "results.json").read_text())["evaluation"]["mirror"]       # not replaced by the others
    assert {path.name for path in results.glob("results*")} == {
        "results.json", "results-k-0.json", "results-k-10000.json", "results-k-18.json",
        "results-mirror-False-weight-1.0.json"}
    assert "'icfg' val: 3 images" in succeed(work, "evaluate.py", "--split", "val")
    status, said, err = command(work, "evaluate.py", "--dataset", "icfg", "mals")
    assert status == 2 and "MALS" in err and "embeddings" not in said        # before any is measured


def test_bf16_computes_features_and_scores_and_orders_nothing(work, monkeypatch):
    """Similarities in bf16 would tie, and shuffle what stands behind the candidates."""
    encode, metrics, found = Retriever.encode_image, ranking.Found.metrics, set()

    def encoding(*given):
        found.add(("encodes", torch.is_autocast_enabled("cuda" if torch.cuda.is_available() else "cpu")))
        return encode(*given)

    def measuring(*given):
        found.add(("orders", torch.is_autocast_enabled("cuda" if torch.cuda.is_available() else "cpu")))
        return metrics(*given)
    monkeypatch.setattr(Retriever, "encode_image", encoding)
    monkeypatch.setattr(ranking.Found, "metrics", measuring)
    assert rows_of(succeed(work, "evaluate.py", "--precision", "bf16")).keys() == {"icfg embeddings", "icfg re-ranked"}
    assert {("encodes", True), ("orders", False)} <= found and ("orders", True) not in found


def test_a_search_starts_without_what_it_does_not_need(work):
    """The compiler and torchvision take seconds to load."""
    code = ("import runpy, sys; sys.argv = ['evaluate.py', '--query', 'a coat', '--device', 'cpu']; "
            f"runpy.run_path({str(ROOT / 'evaluate.py')!r}, run_name='__main__'); "
            "print(sorted({'torch', 'torch._dynamo', 'torchvision'} & sys.modules.keys()))")
    ran = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0 and ran.stdout.endswith("['torch']\n")


def test_evaluation_of_the_pretrained_model(work):
    out = succeed(work, "evaluate.py", "--checkpoint", "out/sda-tiny-s0/best.safetensors")
    assert "trained on sda, pretrained on nothing" in out and "'sda' test: 12 images, 24 captions" in out
    assert rows_of(out).keys() == {"sda embeddings", "sda re-ranked"}


def test_a_sentence_ranks_a_folder(work, photos):
    out = succeed(work, "evaluate.py", "--query", "a woman in a red coat", "--gallery", str(photos))
    shown = re.findall(r"^ +\d+  similarity -?[01]\.\d{3}  (?:match [01]\.\d{3}  )?'(.*)'$", out, re.M)
    images = {str(path) for path in photos.rglob("*.*") if path.suffix.lower() == ".jpg"}
    assert set(shown) == images and len(shown) == 5 and any("nested/deep" in path for path in shown)
    answer = json.loads((work / "out/icfg-tiny-s0/query.json").read_text())
    assert answer["answers"][0]["query"] == "a woman in a red coat" and answer["left_out"] == []
    assert [found["path"] for found in answer["answers"][0]["first"]] == shown
    with Image.open(work / "out/icfg-tiny-s0/query.png") as picture:
        picture.load()
    (photos / "nested/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    try:
        out = succeed(work, "evaluate.py", "--query", "a coat", "--gallery", str(photos))
    finally:
        (photos / "nested/broken.png").unlink()
    assert re.search(r"^Left out: .*nested/broken.png", out, re.M) and len(re.findall(r"\d  similarity", out)) == 5


def test_a_sentence_ranks_the_test_images(work):
    for flags in ((), ("--k", "0")):
        out = succeed(work, "evaluate.py", "--query", "a man with a grün \x1b[31m backpack", *flags)
        assert len(re.findall(r"^ +\d+  similarity .*ICFG-PEDES/imgs/test", out, re.M)) == 10 and "\x1b" not in out


def test_a_sentence_without_a_known_word_is_refused(work):
    (work / "lines.txt").write_text("a coat\n\u8d70\u5728\u8def\u4e0a\n", encoding="utf-8")
    for flags, named in ((("--query", ""), "--query ''"), (("--query", "\u8d70\u5728"), "--query"),
                         (("--queries", "lines.txt"), "lines.txt, line 2"), (("--query", "?!"), "--query '?!'")):
        for dataset in ("cuhk", "icfg"):
            message = refused(work, "evaluate.py", "--dataset", dataset, *flags)
            assert named in message and "there is no word in it that the model knows" in message
    out = succeed(work, "evaluate.py", "--query", "a coat \u8d70\u5728", "a hat", "--k", "0", "--gallery",
                  "data/demo-tiny/ICFG-PEDES/imgs/test")
    assert "does not know 2 of its" in out and "'a hat':" in out
    assert not (work / "out/icfg-tiny-s0/results.json").exists()


# ---- a user's mistakes

def refused(folder: Path, script: str, *flags: str) -> str:
    """The one sentence that a command ends in, with exit status 2."""
    status, _, err = command(folder, script, *flags)
    assert status == 2 and re.fullmatch(r"error: \S.*\S\n", err), (status, err)
    return err




@pytest.mark.parametrize("flags, named", [
    (("--bach", "4"), "--bach"),
    (("--batc", "4"), "--batc"),
    (("--batch", "four"), "four"),
    (("--batch", "0"), "--batch 0"),
    (("--accumulate", "0"), "--accumulate 0"),
    (("--evals", "0"), "--evals 0"),
    (("--log-every", "0"), "--log-every 0"),
    (("--lr", "nan"), "--lr nan"),
    (("--epochs", "0"), "--epochs 0"),
    (("--epochs", "nan"), "--epochs nan"),
    (("--epochs", "inf"), "--epochs inf"),
    (("--init", "none", "--seed", "1" + "0" * 30), "--seed"),
    (("--init", "none", "--out", "words.txt"), "words.txt"),
    (("--preset", "nope"), "--preset: invalid choice"),
    (("--precision", "fp8"), "--precision: invalid choice"),
    (("--device", "tpu"), "--device: invalid choice"),
    (("--data-root", "real"), "--init"),
    (("--init", "none", "--data-root", "real"), "'real/ICFG-PEDES'"),
    (("--init", "none", "--dataset", "nope"), "--dataset nope"),
    (("--init", "none", "--dataset", "mals"), "no folder 'data/demo-tiny/MALS'"),
    (("--init", "missing.safetensors"), "missing.safetensors"),
    (("--init", "words.txt"), "words.txt"),
    (("--init", "words.txt", "--bert", "words.txt"), "--bert"),
    (("--init", "none", "--bert", "words.txt"), "words.txt"),
    (("--init", "none", "--vit", "missing.pth"), "missing.pth"),
    (("--init", "none", "--vocab", "missing.txt"), "missing.txt"),
    (("--init", "none", "--preset", "swin", "--batch", "1"), "--batch 1"),
    (("--preset", "swin", "--vit", "words.txt"), "--preset swin has a Swin"),
    (("--preset", "clip", "--clip", "words.txt", "--bert", "words.txt"), "leave out --bert and --vit"),
    (("--preset", "clip", "--clip", "words.txt", "--vit", "words.txt"), "leave out --bert and --vit"),
    (("--preset", "base", "--dataset", "data/demo-tiny"), "--dataset data/demo-tiny needs --init at --preset base"),
    (("--init", "out/icfg-tiny-s0/last.safetensors"), "only resumes its run: give out/icfg-tiny-s0/best.safetensors"),
])
def test_mistakes_in_training(work, flags, named):
    (work / "words.txt").write_text("no checkpoint")
    assert named in refused(work, "train.py", *TINY, *flags)


@pytest.mark.parametrize("flags, named", [
    (("--queri", "a"), "--queri"),
    (("--k", "many"), "many"),
    (("--k", "-2"), "--k -2"),
    (("--batch", "0"), "--batch 0"),
    (("--workers", "-1"), "--workers -1"),
    (("--out", "words.txt"), "words.txt"),
    (("--split", "dev"), "--split: invalid choice"),
    (("--dataset", "nope"), "--dataset nope"),
    (("--dataset", "mals"), "MALS"),
    (("--data-root", "real"), "'real/ICFG-PEDES'"),
    (("--checkpoint", "missing.safetensors"), "missing.safetensors"),
    (("--checkpoint", "words.txt"), "words.txt"),
    (("--checkpoint", "out/icfg-tiny-s0/last.safetensors"), "only resumes its run: give out/icfg-tiny-s0/best.safe"),
    (("--gallery", "."), "--query"),
    (("--k", "0", "--weight", "8"), "nothing is re-ranked"),
    (("--query-image", "words.txt", "--k", "3"), "nothing is re-ranked"),
    (("--query-image", "words.txt", "--weight", "8"), "nothing is re-ranked"),
    (("--query", "a coat", "--gallery", "empty"), "empty"),
    (("--query", "a coat", "--gallery", "missing"), "missing"),
])
def test_mistakes_in_evaluation(work, flags, named):
    (work / "words.txt").write_text("no checkpoint")
    (work / "empty").mkdir()
    assert named in refused(work, "evaluate.py", *flags)


def test_candidates_without_a_trained_fusion_encoder(work):
    succeed(work, "train.py", *QUICK, "--dataset", "icfg", "--fusion-from", "1", "--out", "out/new")
    assert rows_of(succeed(work, "evaluate.py")).keys() == {"icfg embeddings"}
    assert "fusion encoder is not trained" in refused(work, "evaluate.py", "--k", "4")


def test_evaluation_before_any_training(work, in_town, tmp_path, monkeypatch):
    """Takes the shipped retriever and says so; its answers do not go into the package."""
    shipped, folder = tmp_path / "shipped", in_town("fresh")
    shipped.mkdir()
    shutil.copy(work / BEST, shipped / "demo.safetensors")
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    out = succeed(folder, "evaluate.py", "--query", "a man in a red jacket")
    assert "There is no checkpoint under out/ yet, so this is the shipped retriever." in out
    assert (folder / "out/shipped/query.json").exists() and len(list(shipped.iterdir())) == 1
    assert "Wrote out/shipped/results-k-0.json" in succeed(folder, "evaluate.py", "--k", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_cuda_on_a_machine_without(work, script):
    assert "no CUDA device" in refused(work, script, "--device", "cuda")


def test_another_configuration_in_the_same_folder(work):
    before = (work / BEST).read_bytes()
    message = refused(work, "train.py", "--dataset", "icfg", *TINY, "--batch", "8")
    assert "--batch" in message and "--no-resume" in message and (work / BEST).read_bytes() == before


def test_a_checkpoint_of_real_data_asks_for_its_folder(work):
    succeed(work, "train.py", *QUICK, "--dataset", "icfg", "--data-root", "data/demo-tiny", "--out", "out/new")
    assert "--data-root" in refused(work, "evaluate.py")
    assert "embeddings" in succeed(work, "evaluate.py", "--data-root", "data/demo-tiny")


def test_what_may_come_before_a_set_of_ones_own(tmp_path):
    """At a preset that no drawn people are made for, nothing that the user did not ask for."""
    own = TrainConfig(dataset=str(tmp_path), preset="base")
    with pytest.raises(UserError, match="needs --init"):
        stages.check(own)
    for given in ({"init": "none"}, {"init": "scratch"}, {"init": str(tmp_path)}, {"check": True}, {"preset": "demo"},
                  {"dataset": "icfg"}):
        stages.check(dataclasses.replace(own, **given))
    (tmp_path / "sda_0.json").write_text("[]")
    stages.check(own)           # it is itself for pretraining
    with pytest.raises(UserError, match="--data-root needs --init"):
        stages.check(dataclasses.replace(own, dataset="icfg", data_root="real", init="scratch"))


def test_a_folder_of_a_run_means_its_best_checkpoint(work):
    out = succeed(work, "evaluate.py", "--checkpoint", "out/icfg-tiny-s0", "--k", "0")
    assert "out/icfg-tiny-s0: trained on icfg" in out and "Wrote out/icfg-tiny-s0/results-k-0.json" in out
    out = succeed(work, "train.py", *TINY, "--steps", "1", "--init", "out/sda-tiny-s0")
    assert "Starting from out/sda-tiny-s0, trained on sda" in out
    assert "out/icfg-tiny-s0-from-sda-tiny-s0/best.safetensors is ready" in out


def test_results_of_another_checkpoint_in_the_folder_stay(work):
    for name in ("best", "other"):
        if name == "other":
            shutil.copy(work / BEST, work / BEST.replace("best", name))
        succeed(work, "evaluate.py", "--checkpoint", BEST.replace("best", name), "--k", "0")
    assert {path.name for path in (work / BEST).parent.glob("r*")} == {
        "results-k-0.json", "ranking-k-0.png", "results-other-k-0.json", "ranking-other-k-0.png"}


def test_a_misspelt_set_is_found_before_pretraining(tmp_path):
    assert "--dataset icgf" in refused(tmp_path, "train.py", "--dataset", "icgf", *TINY)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_lists_the_flags(tmp_path, script):
    out = succeed(tmp_path, script, "--help")
    assert "--dataset" in out and "--batch" in out and f"python {script}" in out
    assert script != "train.py" or "(default: 10)" in out       # epochs of the bare command, by its recipe


# ---- what is written about the commands

EXTRA = {       # what makes a documented command tiny
    "train.py": (*TINY, "--no-resume", "--steps", "2", "--batch", "4", "--evals", "1"), "evaluate.py": (),
    "adapt.py": ("--size", "tiny", "--images", "20", "--malformed", "0")}


def documented() -> list[str]:
    """Commands for the three scripts, each on a line of README.md or of the scripts' own descriptions."""
    readme = ROOT / "README.md"
    texts = [readme.read_text(encoding="utf-8")] if readme.exists() else []
    texts += [(ROOT / script).read_text(encoding="utf-8").split('"""')[1] for script in EXTRA]
    lines = [part.strip().removeprefix("$ ").removeprefix(".venv/bin/") for text in texts
             for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    commands = [re.split(r" {2,}| #", re.sub(r" +(?=-)", " ", line))[0] for line in lines
                if re.match(r"python3? (train|evaluate|adapt)\.py( |$)", line)]
    return [line for line in dict.fromkeys(commands)
            if not re.search(r"\b[A-Z]{3,}\b|\.\.\.|[<>|]|cuda", line)]      # placeholders, other machines


def test_a_terminal_need_not_know_every_character(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "__stdout__", terminal)
    run(lambda: print("Zoë"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"Zo\\xeb\n"


def test_what_ctrl_c_leaves(capsys, monkeypatch):
    """evaluate.py goes on from nothing."""
    def main() -> None:
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == "Stopped. The same command goes on from what was saved last.\n"


def test_documented_commands_run(work):
    """At tiny size, in the order they are written; a training starts over where one of the others was before."""
    commands = documented()
    assert {line.split()[1] for line in commands} == EXTRA.keys() and len(commands) >= 8
    for line in commands:
        _, script, *flags = shlex.split(re.sub(r"-(demo|small|base)-", "-tiny-", line))
        ran = command(work, script, *flags, *EXTRA[script])
        assert (ran.status, ran.err) == (0, ""), line
