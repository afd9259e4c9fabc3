"""Every command killed with SIGKILL at random moments and started again, until it has survived them all.

    python tests/stress/killed.py                    50 kills each of train.py, adapt.py, evaluate.py and the study
    python tests/stress/killed.py --kills 5 --commands train adapt

Tiny size, on the CPU; a command dies with all its processes. Whenever one gets to its end, what it wrote must be what
an undisturbed run wrote, bit for bit but for seconds and dates; then its output is removed and it starts over. Prints
a line for each command.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TINY = ("--preset", "tiny", "--device", "cpu")
COMMANDS = {    # flags, and the folders of output
    "train": (("train.py", *TINY, "--dataset", "icfg", "--steps", "6", "--evals", "3"), ("out",)),
    "adapt": (("adapt.py", "--size", "tiny", "--device", "cpu", "--images", "130"), ("out",)),
    "evaluate": (("evaluate.py", "--device", "cpu", "--checkpoint", "kept/best.safetensors", "--out", "out"), ("out",)),
    "study": (("-m", "tests.study", "--quick"), ("out",)),
}
TIMED = {"seconds", "images_per_second"}


def start(command: tuple[str, ...], folder: Path) -> subprocess.Popen:
    script = command if command[0] == "-m" else (str(ROOT / command[0]), *command[1:])
    return subprocess.Popen([sys.executable, *script], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, start_new_session=True)


def untimed(value):
    """JSON without what a clock decides."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMED}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, object]:
    """What lies in the folder, comparable: tensors and facts, JSON, bytes of pictures. No scratch file may be left."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: (value.shape, value.numpy().tobytes()) for key, value in load_file(path).items()}
        elif path.suffix == ".json":
            found[name] = untimed(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            lines = [untimed(json.loads(line)) for line in path.read_text().splitlines()]
            found[name] = {(line["step"], "val" in line): line for line in lines}   # a step done again is there twice
        else:
            found[name] = path.read_bytes()
    return found


def remove(folder: Path, outputs: tuple[str, ...]) -> None:
    for name in outputs:
        shutil.rmtree(folder / name, ignore_errors=True)


def survive(name: str, kills: int, folder: Path) -> str:
    """Kill and restart one command; one line about it. AssertionError where it is not what it should be."""
    command, outputs = COMMANDS[name]
    began = time.perf_counter()
    process = start(command, folder)
    assert process.wait() == 0, process.stderr.read().decode()[-500:]
    length, expected = time.perf_counter() - began, {output: outcome(folder / output) for output in outputs}
    rng, killed, finished = random.Random(name), 0, 0
    remove(folder, outputs)
    while True:
        process = start(command, folder)
        try:
            status = process.wait(rng.uniform(0, length) if killed < kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert status == 0, process.stderr.read().decode()[-500:]
        for output in outputs:
            found = outcome(folder / output)
            wrong = [key for key in expected[output].keys() | found if expected[output].get(key) != found.get(key)]
            assert not wrong, f"{name}: {wrong} after {killed} kills"
        finished += 1
        remove(folder, outputs)
        if killed == kills:     # the last word is always a run that goes on after a kill
            break
    return f"{name}: killed {killed} times, finished {finished} times, each time as undisturbed ({length:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        process = start(COMMANDS["train"][0], folder)       # draws the town, makes the checkpoint that evaluate reads
        assert process.wait() == 0, process.stderr.read().decode()
        shutil.move(folder / "out/icfg-tiny-s0", folder / "kept")
        shutil.rmtree(folder / "out")
        for name in given.commands:
            print(survive(name, given.kills, folder), flush=True)


if __name__ == "__main__":
    main()
