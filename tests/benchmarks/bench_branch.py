"""DaD's branch of low rank: its training and the sampling, before and now.

    python -m tests.benchmarks.bench_branch                       demo, on the CPU
    python -m tests.benchmarks.bench_branch --size base --device cuda --train 32 --sample 64

"Before" is the code until November 2026. It computed a layer of low rank beside each frozen one; now one layer is
computed, with the sum of both weights. It also stored the denoiser's weights in channels_last; now only activations are
stored so. Data and weights are random, in float32. Before and now take turns, --repeats times each; the best times
count.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from mra.config import DIFFUSION_PRESETS, DiffusionConfig
from mra.diffusion.denoiser import Denoiser, TextStates, low_rank_branch, zero

RANK = 64


class Beside(nn.Module):
    """A frozen layer and, beside it, one of low rank, as before."""

    def __init__(self, frozen: nn.Conv2d | nn.Linear, rank: int):
        super().__init__()
        self.frozen, bias = frozen, frozen.bias is not None
        if isinstance(frozen, nn.Conv2d):
            first = nn.Conv2d(frozen.in_channels, rank, frozen.kernel_size, frozen.stride, frozen.padding, bias=False)
            last = nn.Conv2d(rank, frozen.out_channels, 1, bias=bias)
        else:
            first, last = nn.Linear(frozen.in_features, rank, bias=False), nn.Linear(rank, frozen.out_features, bias)
        self.beside = nn.Sequential(first, zero(last))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.beside(x)


def denoiser_before(size: DiffusionConfig) -> Denoiser:
    return Denoiser(size).to(memory_format=torch.channels_last)


def branch_before(base: Denoiser, rank: int) -> tuple[Denoiser, nn.ModuleList]:
    """As `low_rank_branch`, but `base` becomes a part of it."""
    beside = nn.ModuleList()
    for name, layer in list(base.requires_grad_(False).named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.startswith("text_encoder."):
            both = Beside(layer, rank)
            base.set_submodule(name, both)
            beside.append(both.beside)
    return base, beside


def seconds(work: Callable, device: torch.device) -> float:
    """Of one call of `work`: the mean of at least two calls, which take half a second."""
    calls, started = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - started < 0.5:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls += 1
    return (time.perf_counter() - started) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="demo", choices=DIFFUSION_PRESETS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--train", type=int, default=16, help="samples of a training step")
    parser.add_argument("--sample", type=int, default=64, help="latents of a sampling step without guidance")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device, size = torch.device(given.device), replace(DIFFUSION_PRESETS[given.size], vocab=1000)
    machine = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine() + " CPU"
    print(f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch {torch.__version__}; "
          f"{given.size}, rank {RANK}, {given.train} samples a training step, {given.sample} a sampling step")

    def data(count: int) -> tuple[Tensor, Tensor, TextStates]:
        states = torch.randn(count, 40, size.text_dim, device=device)
        text = TextStates(states, torch.ones(count, 40, dtype=torch.bool, device=device))
        return torch.randn(count, *size.shape, device=device), torch.rand(count, device=device) * 1000, text

    batch, latents = data(given.train), data(given.sample)

    def works(denoiser_of: Callable, branch_of: Callable) -> dict[str, Callable]:
        """A step of training, and one of sampling: of the denoiser alone, since the branch is merged into it."""
        adapted, branch = branch_of(denoiser_of(size).to(device), RANK)
        parameters, merged = list(branch.to(device).parameters()), denoiser_of(size).to(device)

        def train() -> None:
            torch.autograd.grad((adapted(*batch) - batch[0]).square().mean(), parameters)

        def sample() -> None:
            with torch.inference_mode():
                merged(*latents)

        return {"training": train, "sampling": sample}

    sides = {"before": works(denoiser_before, branch_before), "now": works(Denoiser, low_rank_branch)}
    for name, count in (("training", given.train), ("sampling", given.sample)):
        times = {side: [] for side in sides}
        for _ in range(given.repeats):
            for side, work in sides.items():
                times[side].append(seconds(work[name], device))
        before, now = (min(times[side]) for side in sides)
        print(f"{name}: before {count / before:.1f} samples/s, now {count / now:.1f}; {before / now:.2f} times as fast",
              flush=True)


if __name__ == "__main__":
    main()
