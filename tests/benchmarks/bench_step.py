"""Time and memory of one training step, random data or the drawn source's.

    python -m tests.benchmarks.bench_step --loop --steps 20                           the loop of train.py at `demo`
    python -m tests.benchmarks.bench_step --preset base swin --batch 40 --steps 20    on a GPU
    python -m tests.benchmarks.bench_step --batch 2 4 --target 40 --sides eager       on the CPU: extrapolates memory

--loop trains `demo` on batches of the drawn source in two ways that take turns, step by step: as train.py did until
November 2026 and as it does now. Before: one thread, each operation shared out over all cores, PyTorch's own dropout,
captions of any length in a batch, which is read before the step. Now: two threads, each with half of the batch and
dropout masks of its own, captions of similar length in a batch, the next batch read meanwhile. It prints medians of
seconds and of images a second.

Else a fine-tuning step (ITC, ITM, MLM, EDA captions; AdamW) at a preset's full size, eager beside compiled, as train.py
does with --compile, in bf16; and beside the 383 ms and 27.1 GiB that a plain step of the released model takes at batch
40, 384x256, EDA captions (one H100, eager bf16 autocast; measured elsewhere). Every line is measured in a fresh
process; on the CPU the peak is that process's resident memory.
"""

import argparse
import dataclasses
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial

import torch

from mra import losses
from mra.config import PRESETS, TrainConfig, recipe
from mra.data.batches import Batch, PairDataset, loader, order
from mra.data.tokenizer import Tokenizer
from mra.formats.read import load
from mra.retriever import Objective, Retriever
from mra.run import contrastive, stages
from mra.run import loop as loops
from mra.run import machine as machine_module
from mra.run.machine import Machine
from mra.town import sets
from mra.weights.retrievers import make_retriever

SIDES = "eager", "compiled"
RELEASED_SECONDS, RELEASED_GIB = 0.383, 27.1
TOKENS, MASKED, WARM = 56, 10, 2


def random_batch(preset: str, batch: int) -> Batch:
    config = PRESETS[preset]
    ids, keep = torch.randint(5, 30000, (batch, TOKENS)), torch.ones(batch, TOKENS, dtype=torch.bool)
    at = torch.randint(1, TOKENS, (batch, MASKED))
    return Batch(torch.randn(batch, 3, config.height, config.width), torch.arange(batch), ids, keep, ids, at,
                 ids.gather(1, at), ids, keep)


def measure(preset: str, batch: int, steps: int, compiled: bool) -> tuple[float, float]:
    """Seconds a step, and peak memory in GiB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = make_retriever(dataclasses.replace(PRESETS[preset], vocab=30522)).to(device)
    optimizer = torch.optim.AdamW(stages.param_groups(model, TrainConfig()), 1e-4, fused=True)
    step_model = torch.compile(model) if compiled else model
    data = random_batch(preset, batch).to(device)
    for step in range(steps + WARM):
        if step == WARM:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = losses.total(step_model(data, Objective(True, 0.2, 0.8)), 0.8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps, torch.cuda.max_memory_allocated() / 2**30
    return (time.perf_counter() - started) / steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def training(preset: str, now: bool):
    """A call that makes one step of train.py on the drawn source, now or as before, and returns its seconds."""
    config, machine = TrainConfig(**recipe("sda", preset), dataset="sda", preset=preset), Machine.of("cpu", "")
    tokenizer = Tokenizer.read()
    torch.manual_seed(0)
    model = Retriever(dataclasses.replace(PRESETS[preset], vocab=len(tokenizer)))
    source = load("sda", "train", sets.ready("sda", preset == "tiny"), say=lambda line: None)
    dataset = PairDataset(source, tokenizer, model.config, config)

    def loss_of(portion: loops.Portion):
        objective = Objective(contrastive=partial(contrastive.contrastive, group=portion.group),
                              group=portion.group)
        terms = model(portion.batch, objective)
        return terms | {"loss": losses.total(terms, config.beta)}

    fit = dataclasses.replace(stages.timetable_of(config, len(dataset), 1)[0], steps=10**6,
                              batch=min(config.batch, len(dataset)))
    task = loops.Task("retriever", model, fit, 0, param_groups=stages.param_groups(model, config))
    own = loops.Loop(task, loss_of, machine)
    if not now:
        own.members = [machine.group]
    keys = order(dataset.lengths if now else [0] * len(dataset), fit.batch, 0, 0, 10**6)
    batches = iter(loader(dataset, config.workers if now else 0, batch_sampler=keys,
                          collate_fn=partial(dataset.collate_parts, parts=len(own.members))))
    masks = machine_module.OwnRandomness

    def step(number: int) -> float:
        machine_module.OwnRandomness = masks if now else lambda generator: nullcontext()
        started = time.perf_counter()
        model.train()
        own.backward(number, batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        own.optimizer.step()
        own.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return step, fit.batch


def compare_loops(preset: str, steps: int) -> None:
    """Print both ways of one loop, step by step in turn."""
    (before, batch), (now, _) = training(preset, False), training(preset, True)
    taken = {"before": [], "now": []}
    for number in range(steps + WARM):
        for name, step in (("before", before), ("now", now)):
            taken[name].append(step(number))
    middle = {name: statistics.median(seconds[WARM:]) for name, seconds in taken.items()}
    for name, seconds in middle.items():
        print(f"loop at {preset}, batch {batch}, {name:8}{1000 * seconds:8.0f} ms{batch / seconds:9.1f} images/s"
              f"{middle['before'] / seconds:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["base"], choices=PRESETS)
    parser.add_argument("--batch", type=int, nargs="+", default=[40])
    parser.add_argument("--target", type=int, default=0, help="batch size to extrapolate the memory of two others to")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--loop", action="store_true", help="the loop of train.py, now and before, at demo or tiny")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inner:
        return print(*measure(given.preset[0], given.batch[0], given.steps, given.sides[0] == "compiled"))
    if given.loop:
        print(f"{platform.machine()} CPU, {torch.get_num_threads()} threads; torch {torch.__version__}")
        return compare_loops("tiny" if given.preset == ["tiny"] else "demo", given.steps)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}; torch {torch.__version__}; bf16\n"
          f"{'':34}{'a step':>10}{'pairs/s':>10}{'peak':>12}{'ratio':>10} to {given.sides[0]}, to the released model's")
    for preset in given.preset:
        config, peaks = PRESETS[preset], {}
        for batch in given.batch:
            first = None
            for side in given.sides:
                command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--preset", preset, "--batch",
                           str(batch), "--steps", str(given.steps), "--sides", side, "--inner"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                seconds, peaks[batch] = map(float, done.stdout.split()[-2:])
                first = first or seconds
                title = f"{preset} {config.height}x{config.width}, batch {batch}, {side}"
                beside = f", {RELEASED_SECONDS / seconds:.2f}, {peaks[batch] / RELEASED_GIB:.2f} of its memory"
                print(f"{title:34}{1000 * seconds:7.0f} ms{batch / seconds:10.1f}{peaks[batch]:8.2f} GiB"
                      f"{first / seconds:10.2f}{beside * (batch == 40)}", flush=True)
        if given.target and len(peaks) > 1:
            (small, low), *_, (large, high) = sorted(peaks.items())
            peak = low + (high - low) / (large - small) * (given.target - small)
            print(f"{preset}, batch {given.target}: {peak:.1f} GiB, extrapolated linearly, "
                  f"{peak / RELEASED_GIB:.2f} of the released code's at batch 40")


if __name__ == "__main__":
    main()
