"""Time and memory of one fine-tuning step (ITC, ITM, MLM, EDA captions; AdamW), random data, at a preset's full size.

    python -m tests.benchmarks.bench_step --preset base --batch 40                on a GPU
    python -m tests.benchmarks.bench_step --preset base --batch 2 4 --target 40   on the CPU: extrapolates memory

Prints the memory beside the 27 GiB that the released code takes at batch 40, 384x256, bf16, EDA captions (one H100).
On the CPU each batch size runs in a fresh process, and the peak is that process's resident memory.
"""

import argparse
import dataclasses
import platform
import resource
import subprocess
import sys
import time

import torch

from mra import losses
from mra.config import PRESETS, TrainConfig
from mra.data.batches import Batch
from mra.retriever import Retriever
from mra.training import make_optimizer

RELEASED_GIB = 27.0
TOKENS, MASKED = 56, 10


def random_batch(preset: str, batch: int) -> Batch:
    config = PRESETS[preset]
    ids, keep = torch.randint(5, 30000, (batch, TOKENS)), torch.ones(batch, TOKENS, dtype=torch.bool)
    at = torch.randint(1, TOKENS, (batch, MASKED))
    return Batch(torch.randn(batch, 3, config.height, config.width), torch.arange(batch), ids, keep, ids, at,
                 ids.gather(1, at), ids, keep)


def measure(preset: str, batch: int, steps: int) -> tuple[float, float]:
    """Seconds a step, and peak memory in GiB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Retriever(dataclasses.replace(PRESETS[preset], vocab=30522)).to(device)
    optimizer = make_optimizer(model, TrainConfig())
    data = random_batch(preset, batch).to(device)
    for step in range(steps + 1):
        if step == 1:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = losses.total(model(data, True, 0.2, 0.8), 0.8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps, torch.cuda.max_memory_allocated() / 2**30
    return (time.perf_counter() - started) / steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[40])
    parser.add_argument("--target", type=int, default=40, help="batch size to extrapolate to from two measured ones")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--inner", action="store_true", help="measure here and print two numbers")
    given = parser.parse_args()
    if given.inner:
        return print(*measure(given.preset, given.batch[0], given.steps))
    config, cpu = PRESETS[given.preset], f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}; torch {torch.__version__}; "
          f"{given.preset} {config.height}x{config.width}, bf16 autocast")
    peaks = {}
    for batch in given.batch:
        command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--preset", given.preset, "--batch", str(batch),
                   "--steps", str(given.steps), "--inner"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, peaks[batch] = map(float, done.stdout.split())
        print(f"batch {batch:3}: {seconds:.3f} s a step, {batch / seconds:.1f} pairs/s, peak {peaks[batch]:.2f} GiB")
    if given.target not in peaks and len(peaks) > 1:
        (small, low), *_, (large, high) = sorted(peaks.items())
        peaks[given.target] = low + (high - low) / (large - small) * (given.target - small)
        print(f"batch {given.target:3}: extrapolated linearly")
    if given.target in peaks:
        print(f"batch {given.target}: ours {peaks[given.target]:.1f} GiB, released code {RELEASED_GIB} GiB, "
              f"ratio {peaks[given.target] / RELEASED_GIB:.2f}")


if __name__ == "__main__":
    main()
