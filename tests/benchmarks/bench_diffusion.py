"""Speed and memory of DaD's branch training and of its sampling, eager beside compiled, in bf16, on random data.

    python -m tests.benchmarks.bench_diffusion --size base --batch 32        on a GPU
    python -m tests.benchmarks.bench_diffusion --size demo --batch 32        on the CPU

Sampling is DDIM with guidance (two passes in one). The last column is the share of what a large bf16 matrix product
reaches on this machine; operations are counted by PyTorch's flop counter.
"""

import argparse
import dataclasses
import platform
import resource
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from mra.config import DIFFUSION_PRESETS
from mra.data.tokenizer import Tokenizer
from mra.diffusion import Schedule, ddim, diffusion_loss
from mra.diffusion.denoiser import DomainBranch
from mra.diffusion.sampling import Diffusion, guide

CAPTION = "a slim woman with long blond hair wears a red jacket over a white top, black jeans and white sneakers"


def seconds_of(run: Callable, device: torch.device, repeat: int) -> float:
    run()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeat):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeat


def ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / seconds_of(lambda: a @ b, device, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base" if torch.cuda.is_available() else "demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    tokenizer, schedule, batch = Tokenizer.read(), Schedule.cosine(), options.batch
    base = Diffusion(dataclasses.replace(DIFFUSION_PRESETS[options.size], vocab=len(tokenizer)), tokenizer)
    base = base.to(device).requires_grad_(False)
    branch = DomainBranch(base.denoiser).to(device)
    optimizer = torch.optim.AdamW(branch.parameters(), 1e-4, fused=True)
    size, top = base.config, ceiling(device)
    both = base.read([CAPTION] * batch + [""] * batch)
    latents, noise = torch.randn(2, batch, *size.shape, device=device)
    white = torch.ones(batch, 1, size.height, size.width, device=device)
    t = torch.randint(1000, (batch,), device=device)
    print(f"{name}, {platform.processor() or platform.machine()}, torch {torch.__version__}; {options.size} "
          f"{size.height}x{size.width}, batch {batch}, {options.steps} DDIM steps; denoiser "
          f"{sum(p.numel() for p in base.denoiser.parameters()) / 1e6:.1f} M parameters, branch "
          f"{sum(p.numel() for p in branch.parameters()) / 1e6:.1f} M; matrix product {top / 1e12:.1f} TFLOP/s")
    print(f"{'':28}{'images/s':>10}{'GiB':>8}{'ceiling':>9}")
    counted = {}
    for mode in ("eager", "compiled"):
        denoiser, side = ((torch.compile(x) if mode == "compiled" else x) for x in (base.denoiser, branch))

        def train() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                diffusion_loss(lambda z, t: denoiser(z, t, both[:batch], side(z, t, both[:batch], white)),
                               latents, noise, t, schedule).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        @torch.no_grad()
        def sample() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                ddim(guide(denoiser, both[:batch], both[batch:], side, white, 3.0, 1.0, 0.7), noise, schedule,
                     options.steps)

        for title, run in (("branch training", train), ("sampling", sample)):
            if mode == "eager":
                with FlopCounterMode(display=False) as counter:
                    run()
                counted[title] = counter.get_total_flops()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds_of(run, device, options.repeat)
            memory = (torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                      else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            print(f"{title + ', ' + mode:28}{batch / taken:10.1f}{memory:8.2f}{counted[title] / taken / top:9.1%}")


if __name__ == "__main__":
    main()
