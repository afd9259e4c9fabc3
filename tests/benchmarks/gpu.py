"""Everything that the table "On a GPU" of README.md claims, in one run on one card, as a table in Markdown.

    python -m tests.benchmarks.gpu                  # at most 9 minutes
    python -m tests.benchmarks.gpu --tiny           # on the CPU, at tiny sizes: whether all of it runs

The benchmarks run one after another, the most important first, each in a process of its own. Their lines stand in the
table as they were printed. They are appended to --out at once, so a run that ends early keeps what it has measured and
lists the rest as skipped. Aims are for an H100-class card: the contrastive loss's of both passes, re-ranking's of one
pass. Where diffusers is installed, it is measured beside (SD 1.5: Stable Diffusion 1.5).
"""

import argparse
import datetime
import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from mra.config import UserError
from mra.run.command import run

ROOT = Path(__file__).resolve().parents[2]
TINY = {        # flags that override those of the rows that begin so
    "bench_similarity": "--size 64x8 --repeats 1 --sides ours",
    "bench_rerank": "--preset tiny --queries 3 --gallery 4 --k 2 --plain-queries 2",
    "bench_step": "--preset tiny --batch 4 --steps 1 --sides eager",
    "bench_diffusion --size base": "--size tiny --batch 1 --steps 1 --repeat 1 --modes eager",
    "bench_diffusion --size sd15": "--size sd15-tiny --batch 1 --steps 1 --repeat 1 --modes eager",
}


class Row(NamedTuple):
    """A command that is measured, and the most seconds that it may take; it is skipped where fewer are left."""

    what: str
    aim: str
    command: str
    seconds: int


ROWS = (
    Row("loss at 32,768 x 256", "11 ms", "bench_similarity --size 32768x256 --gallery --sides ours compiled", 80),
    Row("loss, larger", "33 and 60 ms", "bench_similarity --size 32768x2048 65536x768 --gallery --sides ours", 80),
    Row("loss at 8,192 x 256", "no slower than compiled",
        "bench_similarity --size 8192x256 --gallery --sides ours compiled plain", 80),
    Row("re-ranking, a quarter of CUHK's test set, one pass; 4 times this for the whole", "10 s, 8 GiB",
        "bench_rerank --preset swin --queries 1539 --gallery 768 --k 512 --plain-queries 4", 60),
    Row("fine-tuning step, `base`", "", "bench_step --preset base --batch 40 --steps 10 --sides eager", 60),
    Row("the step, `base`, compiled", "", "bench_step --preset base --batch 40 --steps 10 --sides compiled", 150),
    Row("branch beside SD 1.5", "", "bench_diffusion --size sd15 --batch 8 --repeat 2 --modes eager", 150),
    Row("branch, `base`", "", "bench_diffusion --size base --batch 32 --repeat 2 --modes eager", 60),
    Row("the step, `swin`", "", "bench_step --preset swin --batch 40 --steps 10 --sides eager", 60),
    Row("re-ranking, CUHK's test set, one pass", "40 s, 8 GiB",
        "bench_rerank --preset swin --queries 6156 --gallery 3074 --k 512 --plain-queries 4", 120),
    Row("loss, plain", "", "bench_similarity --size 32768x256 32768x2048 --gallery --sides plain", 60),
    Row("beside SD 1.5, compiled", "", "bench_diffusion --size sd15 --batch 8 --repeat 2 --modes compiled", 240),
    Row("branch, `base`, compiled", "", "bench_diffusion --size base --batch 32 --repeat 2 --modes compiled", 180),
    Row("the step, `swin`, compiled", "", "bench_step --preset swin --batch 40 --steps 10 --sides compiled", 180),
)


def lines_of(command: list[str], seconds: float, tiny: bool) -> Iterator[str]:
    """The lines that a command prints, then how it ended if it failed, or was killed after `seconds`."""
    started, hidden = time.monotonic(), {"CUDA_VISIBLE_DEVICES": ""} if tiny else {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"} | hidden)
        kill = partial(os.killpg, process.pid, signal.SIGKILL)      # with the processes that it has started
        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            yield from (line for line in process.stdout if line.strip())
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                kill()
                process.wait()
        if process.returncode == -signal.SIGKILL:
            yield f"killed after {time.monotonic() - started:.0f} s"
        elif process.returncode:
            errors.seek(0)
            said = errors.read().splitlines() or ["?"]
            yield "failed: " + next((line for line in said if "Error:" in line), said[-1])


def measure(row: Row, say: Callable[[str], None], left: float, tiny: bool) -> None:
    """Say a row's lines as they come, where `left` seconds are enough for it; a tiny one never takes long."""
    overriding = next(flags for start, flags in TINY.items() if row.command.startswith(start)) if tiny else ""
    name, *flags = f"{row.command} {overriding}".split()
    told = f"`{' '.join((name, *flags))}`"
    if left < (0 if tiny else row.seconds):
        return say(f"| {row.what} | {row.aim} | skipped: {told} |")
    say(f"| {row.what} | {row.aim} | {told} |")
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *flags]
    with closing(lines_of(command, min(row.seconds, left), tiny)) as lines:
        for line in lines:
            say(f"| | | {' '.join(line.split()).replace('|', '/')} |")


def measure_all(say: Callable[[str], None], minutes: float, tiny: bool) -> None:
    """Say the table. Ctrl-C and SIGTERM skip the rest."""
    end, stopped = time.monotonic() + 60 * minutes, False
    say("| what | aim | as measured |\n|---|---|---|")
    for row in ROWS:
        try:
            measure(row, say, -1 if stopped else end - time.monotonic(), tiny)
        except KeyboardInterrupt:
            stopped = True
            say("| | | interrupted |")
    if stopped:
        sys.exit(130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="that all of it may take")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/gpu.md"), help="file that gets the table too")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here; --tiny runs all of it on the CPU at tiny sizes.")
    machine = f"{platform.machine()} CPU, tiny sizes" if given.tiny else torch.cuda.get_device_name()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("a", encoding="utf-8", buffering=1) as file:
        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=file)

        beside = metadata.version("diffusers") if importlib.util.find_spec("diffusers") else "not installed"
        say(f"\n{machine}; torch {torch.__version__}, CUDA {torch.version.cuda}, diffusers {beside}, "
            f"Python {platform.python_version()}; {datetime.datetime.now():%Y-%m-%d %H:%M}\n")
        measure_all(say, given.minutes, given.tiny)


if __name__ == "__main__":
    run(main)
