"""Dress rehearsal at full size: a drawn set with the numbers of CUHK-PEDES, and the commands that read it.

    python tests/stress/rehearsal.py --root FOLDER                  draws 40,206 images, 20 minutes of CPU; runs all
    python tests/stress/rehearsal.py --root FOLDER --draw           draws alone
    python tests/stress/rehearsal.py --root FOLDER --commands check base        a part of the commands

The set has 13,003 identities and 80,440 captions, split as published. `check` reads and decodes all of it, `base`
trains a few steps at the size of the paper and is stopped as by Ctrl-C, `demo` trains and validates the small model,
`evaluate` ranks the 3,074 test images for the 6,156 queries with it, at its own k. A line for each: seconds until the
first step or row, seconds in all, seconds of CPU, and the most memory that its largest process held.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mra.formats.check import PUBLISHED  # noqa: E402
from mra.town import sets  # noqa: E402

SIZES = [(split, people, images / people) for split, (people, images, _) in PUBLISHED["cuhk"].items()]
COMMANDS = {    # flags, the first line of a step or a row, and whether to stop there
    "check": (("train.py", "--check", "--workers", "{workers}"), "  2,000 of", False),
    "base": (("train.py", "--preset", "base", "--init", "none", "--batch", "{batch}", "--log-every", "1",
              "--workers", "1", "--no-resume", "--out", "{root}/base"), "step {steps}/", True),
    "demo": (("train.py", "--init", "none", "--steps", "20", "--evals", "1", "--log-every", "1", "--no-resume",
              "--out", "{root}/demo"), "step 1/", False),
    "evaluate": (("evaluate.py", "--checkpoint", "{root}/demo/best.safetensors"), "cuhk embeddings", False),
}


def draw(root: Path, workers: int) -> None:
    """The set, with as many captions as published: the first images of a split get a third one."""
    sets.build(root, "cuhk", SIZES, 0, workers)
    path = root / "CUHK-PEDES" / "reid_raw.json"
    records = json.loads(path.read_text())
    lacking = {split: captions for split, (_, _, captions) in PUBLISHED["cuhk"].items()}
    lacking = Counter(lacking) - Counter(record["split"] for record in records for _ in record["captions"])
    for record in records:
        if lacking[record["split"]] > 0:
            record["captions"].append(" ".join(reversed(record["captions"])))
            lacking[record["split"]] -= 1
    path.write_text(json.dumps(records))


def rehearse(name: str, given: argparse.Namespace) -> str:
    """Run a command; its line of the table."""
    command, awaited, stop = COMMANDS[name]
    fill = vars(given) | {"root": given.root.resolve()}
    flags = [part.format(**fill) for part in command[1:]]
    started, first = time.perf_counter(), None
    ran = subprocess.Popen([sys.executable, "-u", str(ROOT / command[0]), "--dataset", "cuhk", "--data-root",
                            str(given.root), "--device", "cpu", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in ran.stdout:
        print(f"  {line}", end="", flush=True)
        if first is None and line.startswith(awaited.format(**fill)):
            first = time.perf_counter() - started
            if stop:
                ran.send_signal(signal.SIGINT)
    _, status, used = os.wait4(ran.pid, 0)
    ran.returncode = os.waitstatus_to_exitcode(status)
    if first is None or ran.returncode not in ((130,) if stop else (0,)):
        sys.exit(f"{name} ended with status {ran.returncode}")
    return (f"{name:10}{first:12.1f}{time.perf_counter() - started:12.1f}{used.ru_utime + used.ru_stime:12.1f}"
            f"{used.ru_maxrss / 2**20:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the drawn set and of what is trained on it")
    parser.add_argument("--draw", action="store_true", help="draw, and run nothing")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step at base")
    parser.add_argument("--steps", type=int, default=3, help="steps at base")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw and decode")
    given = parser.parse_args()
    draw(given.root, given.workers)
    lines = [] if given.draw else [rehearse(name, given) for name in given.commands]
    print("\n".join([f"{'':10}{'first, s':>12}{'all, s':>12}{'CPU, s':>12}{'GiB':>12}", *lines]))


if __name__ == "__main__":
    main()
