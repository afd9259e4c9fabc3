"""Many processes are one: 1, 2 and 4 of them, over gloo, at tiny size.

    python tests/stress/processes.py
    python tests/stress/processes.py --only evaluate dying

train      10 steps of contrastive training with smoothing, EDA and erasing, whose epochs end within a batch: weights,
           moments, losses and val of one process (negatives and dropout are drawn in each process, so they are off)
adapt      DaD trained and sampled by 2 is bit for bit that of 1; sampled by 4, from the same networks, too
evaluate   results.json and ranking.png, 22 images in batches of 4
dying      one of 4 processes killed, failing, or with a loss that is not finite: all end within 60 seconds and say
           why; 2 go on from there and come to what one undisturbed process comes to

Prints a line for each, with the largest difference; exit status 1 where one is not as it should be.
"""

import argparse
import dataclasses
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mra import losses  # noqa: E402
from mra.config import PRESETS  # noqa: E402

CLOSE = 3e-4        # of weights that ten steps have moved by 0.01: AdamW divides by the size of gradients
ENDS = 60           # seconds
ITC = ("--preset", "tiny", "--dataset", "icfg", "--init", "none", "--device", "cpu", "--precision", "float32", "--lr",
       "1e-3", "--fusion-from", "1", "--smoothing", "0.2", "--eda", "0.8", "--erase", "0.6", "--log-every", "1")
ADAPT = ("--size", "tiny", "--device", "cpu", "--precision", "float32", "--images", "260", "--malformed", "0")


# ---- in each process

def worker(script: str, *flags: str) -> None:
    """Run a script of the package without dropout; at the step and in the process that DIE names, die as it says."""
    PRESETS["tiny"] = dataclasses.replace(PRESETS["tiny"], dropout=0.0)
    total, calls = losses.total, []

    def mortal(terms, beta):
        calls.append(None)
        how, rank, step = os.environ.get("DIE", "no -1 -1").split()
        if (rank, len(calls)) == (os.environ.get("RANK"), int(step)):     # in each of several processes one call a step
            Path("died").write_text(str(time.time()))
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "fails":
                raise RuntimeError("the reason of it all")
            return total(terms, beta) * math.nan
        return total(terms, beta)
    losses.total = mortal
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


# ---- the tests

def start(folder: Path, count: int, *command: str, die: str = "no -1 -1") -> subprocess.CompletedProcess:
    """A script in so many processes."""
    folder.mkdir(exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}") if count > 1 else ()
    return subprocess.run([sys.executable, *torchrun, __file__, "--worker", *command], cwd=folder, capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
                                          "DIE": die})


def succeed(folder: Path, count: int, *command: str) -> str:
    ran = start(folder, count, *command)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def difference(one: Path, other: Path) -> float:
    """The largest difference of two checkpoints' tensors."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def figures_of(folder: Path) -> torch.Tensor:
    """Every figure of a log but the speed, one after another."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return torch.tensor([value for row in rows for values in (row, row.get("val", {}).get("embeddings", {}))
                         for name, value in sorted(values.items()) if name not in ("images_per_second", "val")])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock" and "adaptation" not in path.name}


def train(place: Path) -> str:
    found = []
    for count in (1, 2, 4):
        succeed(place / str(count), count, "train.py", *ITC, "--steps", "10", "--evals", "2", "--batch",
                str(8 // count), "--out", "out")
        if count > 1:
            found.append(difference(place / "1/out/last.safetensors", place / f"{count}/out/last.safetensors"))
            ours, theirs = (figures_of(place / str(c) / "out") for c in (1, count))
            assert found[-1] < CLOSE and (ours - theirs).abs().max() < 2e-3, (count, found, (ours - theirs).abs().max())
    return f"2 and 4 processes as 1 to {max(found):.0e}"


def adapt(place: Path) -> str:
    for count in (1, 2):
        succeed(place / str(count), count, "adapt.py", *ADAPT)
    one, two = (files(place / str(count) / "out/sda") for count in (1, 2))
    assert one == two, [name for name in one.keys() | two if one.get(name) != two.get(name)][:5]
    shutil.copytree(place / "1", place / "4")
    shutil.rmtree(place / "4/out/sda")
    said = succeed(place / "4", 4, "adapt.py", *ADAPT)
    four = files(place / "4/out/sda")
    assert "branch.safetensors is complete" in said
    assert one == four, [name for name in one if one[name] != four.get(name)]
    return f"{sum(name.endswith('.png') for name in one)} images, their records and the report, bit for bit"


def evaluate(place: Path) -> str:
    succeed(place / "1", 1, "train.py", *ITC, "--fusion-from", "0", "--steps", "5", "--evals", "1", "--batch", "4",
            "--out", "out/x")
    results = []
    for count in (1, 2, 4):
        shutil.copytree(place / "1", place / f"of{count}")
        said = succeed(place / f"of{count}", count, "evaluate.py", "--dataset", "icfg", "cuhk", "--batch", "4",
                       "--device", "cpu")
        assert said.count("cuhk re-ranked") == 1
        found = json.loads((place / f"of{count}/out/x/results.json").read_text())["results"]
        results.append(({name: row | {"seconds": 0} for name, row in found.items()},
                        (place / f"of{count}/out/x/ranking.png").read_bytes()))
    assert results[0] == results[1] == results[2]
    return "2 and 4 processes as 1, digit for digit"


def dying(place: Path, ends: float = ENDS) -> str:
    flags = (*ITC, "--steps", "12", "--evals", "4", "--out", "out")
    succeed(place / "whole", 1, "train.py", *flags, "--batch", "8")
    took = []
    for die, reason in (("killed 2 5", "Signal 9"), ("fails 1 8", "the reason of it all"), ("nan 0 8", "is nan by")):
        shutil.rmtree(place / "cut", ignore_errors=True)
        ran = start(place / "cut", 4, "train.py", *flags, "--batch", "2", die=die)
        took.append(time.time() - float((place / "cut/died").read_text()))
        assert ran.returncode != 0 and reason in ran.stderr and took[-1] < ends, (die, took, ran.stderr[-3000:])
    refused = start(place / "cut", 2, "train.py", *flags, "--batch", "2")
    assert refused.returncode != 0 and "--batch x processes was 8 and is 4" in refused.stderr
    said = succeed(place / "cut", 2, "train.py", *flags, "--batch", "4", "--steps", "12")
    assert "going on after step 6 of 12" in said
    found = difference(place / "whole/out/last.safetensors", place / "cut/out/last.safetensors")
    assert found < CLOSE, found
    return (f"killed, failing or not finite: all had ended {max(took):.0f} s later; 2 went on and came to what 1 "
            f"undisturbed comes to, to {found:.0e}")


TESTS = {"train": train, "adapt": adapt, "evaluate": evaluate, "dying": dying}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--ends", type=float, default=ENDS, help="seconds that dying may take")
    given = parser.parse_args()
    for name in given.only:
        with tempfile.TemporaryDirectory() as place:
            more = (given.ends,) if name == "dying" else ()
            print(f"{name}: {TESTS[name](Path(place), *more)}", flush=True)


if __name__ == "__main__":
    main()
