"""A long run at tiny size: memory flat, no file left open, log and checkpoints bounded.

    python tests/stress/long.py                   2,000 steps of pretraining with all losses, 20 evaluations
    python tests/stress/long.py --steps 400 --workers 0

Resident memory and open files are read at every line of the log. In the second half memory may grow by 5 % and files
not at all; the first half is for oneDNN, which keeps its kernels for every shape it has seen (1,024 at most), and
captions have many lengths. Exit status 1 where they do.
"""

import argparse
import os
import resource
import runpy
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mra.run import loop  # noqa: E402

EVERY, GROWTH = 10, 1.05     # steps to a line of the log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evals", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1, help="data loading processes")
    given = parser.parse_args()
    memory, handles, tell = [], [], loop.Loop.tell

    def measured(*given) -> None:
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        handles.append(len(os.listdir("/proc/self/fd")))
        tell(*given)

    loop.Loop.tell = measured
    sys.argv = ["train.py", "--dataset", "sda", "--preset", "tiny", "--init", "none", "--device", "cpu", "--batch", "8",
                "--steps", str(given.steps), "--evals", str(given.evals), "--workers", str(given.workers),
                "--log-every", str(EVERY), "--eda", "0.8", "--erase", "0.6", "--out", "out"]
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        lines = Path("out/log.jsonl").read_text().splitlines()
        names = {path.name for path in Path("out").iterdir()}
        os.chdir("/")
    half = len(memory) // 2
    print(f"{given.steps} steps: resident memory {memory[half // 5]:.0f} MiB after a tenth, {memory[half]:.0f} MiB "
          f"after half, {max(memory[half:]):.0f} MiB at most; open files {handles[half]}, {handles[-1]} at the end; "
          f"{len(lines)} lines of log; {len(names)} files")
    assert max(memory[half:]) <= GROWTH * memory[half], "memory grows"
    assert handles[-1] <= handles[half], "files stay open"
    assert names == {".lock", "best.safetensors", "last.safetensors", "log.jsonl"}, names
    assert len(lines) <= given.steps // EVERY + 2 * given.evals, "more log than lines"


if __name__ == "__main__":
    main()
