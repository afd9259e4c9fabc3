"""Speed and memory of DaD's branch training and of its sampling, eager beside compiled, in bf16, on random data.

    python -m tests.benchmarks.bench_diffusion --size base --batch 32        on a GPU
    python -m tests.benchmarks.bench_diffusion --size demo --batch 32        on the CPU
    python -m tests.benchmarks.bench_diffusion --size sd15 --batch 8         on a GPU

Sampling is DDIM with guidance (two passes in one). The last column is the share of what a large bf16 matrix product
reaches on this machine; operations are counted by PyTorch's flop counter. For sd15, where diffusers is installed, its
U-Net and ControlNet of the same sizes do the same work, the frozen weights in bf16.
"""

import argparse
import copy
import dataclasses
import gc
import importlib.util
import platform
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mra.config import DIFFUSION_PRESETS, DiffusionConfig
from mra.data.tokenizer import Tokenizer
from mra.diffusion.base import Diffusion
from mra.diffusion.denoiser import Denoiser, DomainBranch, TextStates
from mra.diffusion.noising import Schedule, ddim, diffusion_loss
from mra.diffusion.sampling import guide
from mra.weights.clip import CausalTextEncoder
from mra.weights.stable import StableAutoencoder

MODES = "eager", "compiled"
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
    """FLOP/s of the largest bf16 matrix product, up to 8192 x 8192, of which the next smaller one takes under 10 ms."""
    n, seconds = 256, 0.0
    while n < 8192 and seconds < 0.01:
        n *= 2
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
        seconds = seconds_of(lambda: a @ b, device, 3)
    return 2 * n**3 / seconds


def random_base(size: DiffusionConfig) -> Diffusion:
    """A base with random weights; it reads captions if it is ours."""
    if not size.stable:
        tokenizer = Tokenizer.read()
        return Diffusion.new(dataclasses.replace(size, vocab=len(tokenizer)), tokenizer)
    size = dataclasses.replace(size, vocab=49408)
    denoiser = Denoiser(size, CausalTextEncoder(size))
    return Diffusion(size, None, StableAutoencoder(size), denoiser, Schedule.scaled_linear())


def ours(size: DiffusionConfig, options: argparse.Namespace, device: torch.device,
         compiled: bool) -> tuple[Callable, Callable]:
    """A step of the branch's training, and the sampling of a batch."""
    batch = options.batch
    base = random_base(size).to(device).requires_grad_(False)
    branch = DomainBranch(base.denoiser).to(device)
    side = copy.deepcopy(branch)
    optimizer = torch.optim.AdamW(branch.parameters(), 1e-4, fused=True)
    if size.stable:
        both = TextStates(torch.randn(2 * batch, 77, size.text_dim, device=device),
                          torch.ones(2 * batch, 77, dtype=torch.bool, device=device))
    else:
        both = base.read([CAPTION] * batch + [""] * batch)
    latents, noise = torch.randn(2, batch, *size.shape, device=device)
    t = torch.randint(1000, (batch,), device=device)
    denoiser, trained, side = (torch.compile(x) if compiled else x for x in (base.denoiser, branch, side))

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            diffusion_loss(lambda z, t: denoiser(z, t, both[:batch], trained), latents, noise, t,
                           base.schedule).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def sample() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            ddim(guide(denoiser, side, both, 3.0), noise, base.schedule, options.steps)

    return train, sample


def diffusers(size: DiffusionConfig, options: argparse.Namespace, device: torch.device,
              compiled: bool) -> tuple[Callable, Callable]:
    """The same with the models of that package: the frozen ones in bf16, the trained one under autocast."""
    from diffusers import ControlNetModel, UNet2DConditionModel
    batch, schedule = options.batch, Schedule.scaled_linear()
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=size.widths, cross_attention_dim=size.text_dim,
        attention_head_dim=size.heads, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3).to(device).requires_grad_(False)
    control = ControlNetModel.from_unet(unet).to(device).requires_grad_(True)
    side, unet = copy.deepcopy(control).to(torch.bfloat16), unet.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(control.parameters(), 1e-4, fused=True)
    states = torch.randn(2 * batch, 77, size.text_dim, device=device, dtype=torch.bfloat16)
    latents, noise = torch.randn(2, batch, *size.shape, device=device)
    white = torch.ones(2 * batch, 3, size.height, size.width, device=device, dtype=torch.bfloat16)
    t = torch.randint(1000, (batch,), device=device)
    unet, trained, side = (torch.compile(x) if compiled else x for x in (unet, control, side))

    def predict(branch: torch.nn.Module, z: Tensor, t: Tensor) -> Tensor:
        z, words = z.to(torch.bfloat16), states[:len(z)]
        down, middle = branch(z, t, words, white[:len(z)], return_dict=False)
        return unet(z, t, words, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            diffusion_loss(lambda z, t: predict(trained, z, t), latents, noise, t, schedule).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def guided(z: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = predict(side, z.repeat(2, 1, 1, 1), t.repeat(2)).float().chunk(2)
        return unconditional + 3.0 * (conditional - unconditional)

    @torch.no_grad()
    def sample() -> None:
        ddim(guided, noise, schedule, options.steps)

    return train, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base" if torch.cuda.is_available() else "demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    size, top = dataclasses.replace(DIFFUSION_PRESETS[options.size], vocab=1), ceiling(device)
    with torch.device("meta"):
        denoiser = Denoiser(size)
        del denoiser.text_encoder       # it is not counted, so any vocabulary will do
    print(f"{name}, {platform.processor() or platform.machine()}, torch {torch.__version__}; {options.size} "
          f"{size.height}x{size.width}, batch {options.batch}, {options.steps} DDIM steps; denoiser "
          f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M parameters, "
          f"branch {sum(p.numel() for p in DomainBranch(denoiser).parameters()) / 1e6:.1f} M; "
          f"matrix product {top / 1e12:.2g} TFLOP/s")
    print(f"{'':38}{'images/s':>10}{'GiB':>8}{'ceiling':>9}")
    for side in [ours] + [diffusers] * (size.stable and importlib.util.find_spec("diffusers") is not None):
        counted = []
        for mode in options.modes:
            runs = side(size, options, device, mode == "compiled")
            for i, title in enumerate(("branch training", "sampling")):
                if mode == options.modes[0]:
                    with FlopCounterMode(display=False) as counter:
                        runs[i]()
                    counted.append(counter.get_total_flops())
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                taken = seconds_of(runs[i], device, options.repeat)
                memory = (torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                          else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
                print(f"{f'{side.__name__}, {title}, {mode}':38}{options.batch / taken:10.1f}{memory:8.2f}"
                      f"{counted[i] / taken / top:9.1%}", flush=True)
            del runs
            gc.collect()        # what comes next has the device's memory for itself


if __name__ == "__main__":
    main()
