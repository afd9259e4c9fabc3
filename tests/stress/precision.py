"""Do bf16 and float32 train alike? Pretraining on the demo town in both, several seeds of each.

    python tests/stress/precision.py                       3 seeds of 1,000 steps each, some 40 minutes on two cores
    python tests/stress/precision.py --steps 2363          the whole of it

Each loss is averaged over tenths of the run. In every tenth the mean over seeds of bf16 may differ from float32's by
twice the seeds' spread: the larger standard deviation of the two, but at least 1 % of the loss, for a few seeds can
come close to each other by chance. Prints the largest difference of each loss; exit status 1 where one is larger.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOSSES, PARTS = ("itc", "itm", "mlm", "rpc", "rpm"), 10


def curves(precision: str, seed: int, steps: int, folder: Path) -> dict[str, list[float]]:
    """Mean of each loss in each tenth of a run."""
    out = folder / f"{precision}-s{seed}"
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--dataset", "sda", "--init", "none", "--device", "cpu",
                    "--precision", precision, "--seed", str(seed), "--steps", str(steps), "--evals", "1",
                    "--log-every", str(max(1, steps // PARTS)), "--out", str(out)], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in LOSSES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    apart = []
    with tempfile.TemporaryDirectory() as place:
        runs = {precision: [curves(precision, seed, given.steps, Path(place)) for seed in range(given.seeds)]
                for precision in ("bf16", "float32")}
    for name in LOSSES:
        worst = (-1.0, "")
        lines = min(len(run[name]) for several in runs.values() for run in several)     # ITM and MLM join later
        assert lines > 1, name
        for part in range(lines):
            half, full = ([run[name][part] for run in runs[precision]] for precision in ("bf16", "float32"))
            means = statistics.mean(half), statistics.mean(full)
            spread = max(statistics.stdev(half), statistics.stdev(full), 0.01 * means[1])
            share = abs(means[0] - means[1]) / spread
            worst = max(worst, (share, f"{name}: bf16 {means[0]:.3f}, float32 {means[1]:.3f} in line {part + 1} of "
                                       f"{lines}, {share:.2f} of the seeds' spread {spread:.3f}"))
        print(worst[1], flush=True)
        apart += [name] * (worst[0] > 2)
    assert not apart, f"bf16 trains otherwise: {apart}"


if __name__ == "__main__":
    main()
