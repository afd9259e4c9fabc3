"""Speed and memory of DaD's branch training and of sampling with it and without, eager beside compiled, in bf16.

    python -m tests.benchmarks.bench_diffusion --size base --batch 32        on a GPU
    python -m tests.benchmarks.bench_diffusion --size demo --batch 32        on the CPU
    python -m tests.benchmarks.bench_diffusion --size sd15 --batch 8         on a GPU

Data and weights are random. Sampling is DDIM with guidance (two passes in one). The last column is the share of what a
large bf16 matrix product reaches on this machine; operations are counted by PyTorch's flop counter. For sd15, where
diffusers is installed, its U-Net and ControlNet of the same sizes do the same: same batch, steps and guidance, frozen
weights in bf16. Its ControlNet also reads the condition at full resolution. Ours is as adapt.py has it: weights in
float32, which autocast rounds at each use.

For sd15 the last table says where the time goes when adapt.py makes a batch (captions, sampling, images), eager:
seconds of each part, its share, its share of the operations; whether a step waits for the CPU, which launches it; then
the whole, and with changes, beside the unchanged one. Each is the last of --repeat runs.
"""

import argparse
import copy
import dataclasses
import gc
import importlib.util
import operator
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mra import layers
from mra.config import DIFFUSION_PRESETS, DiffusionConfig
from mra.data.tokenizer import Tokenizer
from mra.diffusion.autoencoder import Autoencoder
from mra.diffusion.base import Diffusion, decode
from mra.diffusion.denoiser import Denoiser, DomainBranch, TextStates
from mra.diffusion.noising import Schedule, ddim, diffusion_loss
from mra.diffusion.sampling import guide
from mra.weights.clip import CausalTextEncoder
from mra.weights.stable import StableAutoencoder

SIZES = DIFFUSION_PRESETS | {"sd15-tiny": DiffusionConfig(      # the smallest that sd15's layout allows
    128, 64, 1, (4, 4, 4, 4), 4, (8, 8, 8, 8), 2, 8, 1, 2, positions=77, max_tokens=77, stable=True)}
MODES = "eager", "compiled"
GUIDANCE = 3.0
TITLES = "branch training", "sampling", "sampling without the branch"
CAPTION = "a slim woman with long blond hair wears a red jacket over a white top, black jeans and white sneakers"


def seconds_of(run: Callable, device: torch.device, repeat: int) -> float:
    """The mean of `repeat` runs, after two more or, if repeat is 1, one."""
    for _ in range(min(repeat, 2)):
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


def random_base(size: DiffusionConfig, device: torch.device) -> Diffusion:
    """A frozen base with random weights; it reads captions if it is ours."""
    tokenizer = None if size.stable else Tokenizer.read()
    size = dataclasses.replace(size, vocab=49408 if size.stable else len(tokenizer))
    with device:
        denoiser = Denoiser(size, CausalTextEncoder(size) if size.stable else None)
        autoencoder = StableAutoencoder(size) if size.stable else Autoencoder(size)
    for module in denoiser.modules():       # multiplying by weights that start as 0 takes less power, and so less time
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    schedule = Schedule.scaled_linear() if size.stable else Schedule.cosine()
    return Diffusion(size, tokenizer, autoencoder, denoiser, schedule).eval().requires_grad_(False)


def ours(size: DiffusionConfig, options: argparse.Namespace, device: torch.device,
         compiled: bool) -> tuple[Callable, Callable, Callable]:
    """A step of the branch's training; the sampling of a batch with the branch, and without."""
    batch = options.batch
    base = random_base(size, device)
    branch = DomainBranch(base.denoiser).to(device)
    side = copy.deepcopy(branch).requires_grad_(False)
    optimizer = torch.optim.AdamW(branch.parameters(), 1e-4, fused=True)
    if size.stable:
        both = TextStates(torch.randn(2 * batch, 77, size.text_dim, device=device),
                          torch.ones(2 * batch, 77, dtype=torch.bool, device=device))
    else:
        both = base.encode_text([CAPTION] * batch + [""] * batch)
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
    def sample(side: nn.Module | None) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            ddim(guide(partial(denoiser, branch=side), both, GUIDANCE), noise, base.schedule, options.steps)

    return train, partial(sample, side), partial(sample, None)


def diffusers(size: DiffusionConfig, options: argparse.Namespace, device: torch.device,
              compiled: bool) -> tuple[Callable, Callable, Callable]:
    """The same with the models of that package: the frozen ones in bf16, the trained one under autocast."""
    from diffusers import ControlNetModel, UNet2DConditionModel
    batch, schedule = options.batch, Schedule.scaled_linear()
    with device:
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=size.widths, cross_attention_dim=size.text_dim,
            attention_head_dim=size.heads, norm_num_groups=min(32, size.widths[0]),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3).requires_grad_(False)
        control = ControlNetModel.from_unet(unet).requires_grad_(True)
    side, unet = copy.deepcopy(control).to(torch.bfloat16).requires_grad_(False), unet.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(control.parameters(), 1e-4, fused=True)
    states = torch.randn(2 * batch, 77, size.text_dim, device=device, dtype=torch.bfloat16)
    latents, noise = torch.randn(2, batch, *size.shape, device=device)
    white = torch.ones(2 * batch, 3, size.height, size.width, device=device, dtype=torch.bfloat16)
    t = torch.randint(1000, (batch,), device=device)
    unet, trained, side = (torch.compile(x) if compiled else x for x in (unet, control, side))

    def predict(branch: nn.Module | None, z: Tensor, t: Tensor) -> Tensor:
        z, words, down, middle = z.to(torch.bfloat16), states[:len(z)], None, None
        if branch is not None:
            down, middle = branch(z, t, words, white[:len(z)], return_dict=False)
        return unet(z, t, words, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            diffusion_loss(lambda z, t: predict(trained, z, t), latents, noise, t, schedule).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def guided(branch: nn.Module | None, z: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = predict(branch, z.repeat(2, 1, 1, 1), t.repeat(2)).float().chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    @torch.no_grad()
    def sample(branch: nn.Module | None) -> None:
        ddim(partial(guided, branch), noise, schedule, options.steps)

    return train, partial(sample, side), partial(sample, None)


# ---- where the time goes

class Meter:
    """What the parts of a run take, by `mark`: the time, or the count of operations, at this moment."""

    def __init__(self, device: torch.device):
        self.cuda, self.spans = device.type == "cuda", defaultdict(list)
        self.mark = self.time

    def time(self) -> float | torch.cuda.Event:
        """On a GPU an event on its own time line, so that nothing waits while a part is timed."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self.mark()
        yield
        self.spans[name].append((started, self.mark()))

    def watch(self, name: str, module: nn.Module) -> None:
        """Each call of the module is a part from now on."""
        forward = module.forward

        def watched(*given) -> object:
            with self.part(name):
                return forward(*given)
        module.forward = watched

    def seconds(self, run: Callable, repeat: int) -> dict[str, float]:
        """Of each part in the last of `repeat` runs."""
        for _ in range(repeat):
            self.spans.clear()
            run()
        if not self.cuda:
            return self.sums(operator.sub)
        torch.cuda.synchronize()
        return self.sums(lambda end, start: start.elapsed_time(end) / 1000)

    def operations(self, run: Callable) -> dict[str, float]:
        """Of each part of a run."""
        self.spans.clear()
        with FlopCounterMode(display=False) as counter:
            self.mark = counter.get_total_flops
            run()
        self.mark = self.time
        return self.sums(operator.sub)

    def sums(self, difference: Callable) -> dict[str, float]:
        return {name: sum(difference(end, start) for start, end in spans) for name, spans in self.spans.items()}


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Disjoint parts of what a Meter measured."""
    own = {name: parts.get(name, 0.0) for name in ("captions", "encoder and middle", "branch")}
    own["decoder half"] = parts["denoiser"] - own["encoder and middle"] - own["branch"]
    own["images"] = parts["images"]
    return own | {"rest: guidance and sampler": parts["all"] - sum(own.values())}


def round_weights(network: nn.Module) -> None:
    """Store the weights in bf16 that autocast rounds at each use."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


def lower(base: Diffusion, branch: DomainBranch) -> None:
    """Compute in bf16 all through, without autocast, as diffusers does: norms too."""
    entries = [base.autoencoder.decoder]
    for network in (base.denoiser, branch):
        entries += [network.encoder.first, network.encoder.level]
    for entry in entries:
        entry.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
    base.bfloat16()
    branch.bfloat16()


def launched(step: Callable, device: torch.device) -> tuple[float, float]:
    """Seconds until the CPU has launched a step, and until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with torch.autocast(device.type, torch.bfloat16):
        step()
        wait()
        started = time.perf_counter()
        step()
        took = time.perf_counter() - started
        wait()
    return took, time.perf_counter() - started


@torch.no_grad()
def where(size: DiffusionConfig, options: argparse.Namespace, device: torch.device) -> None:
    """Print where the time goes, with the branch and without."""
    base, meter = random_base(size, device), Meter(device)
    branch = DomainBranch(base.denoiser).to(device).requires_grad_(False)
    meter.watch("denoiser", base.denoiser)
    meter.watch("encoder and middle", base.denoiser.encoder)
    meter.watch("branch", branch)
    ids = torch.randint(5, 1000, (2 * options.batch, size.max_tokens), device=device)
    noise = torch.randn(options.batch, *size.shape, device=device)

    def run(side: DomainBranch | None, guidance: float = GUIDANCE, autocast: bool = True,
            within: Callable[[], AbstractContextManager] = nullcontext) -> None:
        with meter.part("all"), within(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            with meter.part("captions"):
                both = base.denoiser.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
            denoise = guide(lambda z, t, text: base.denoiser(z, t, text, side), both, guidance)
            latents = ddim(denoise, noise, base.schedule, options.steps)
            with meter.part("images"):
                decode(base.autoencoder, latents, None)

    print(f"{'where the time of sampling goes':34}{'with the branch':>26}{'without':>26}")
    runs = partial(run, branch), partial(run, None)
    times = [shares(meter.seconds(one, options.repeat)) for one in runs]
    counts = [shares(meter.operations(one)) for one in runs]
    for name in times[0]:
        columns = (f"{taken[name]:10.3f} s{taken[name] / sum(taken.values()):7.1%}"
                   f"{counted[name] / sum(counted.values()):7.1%}" for taken, counted in zip(times, counts))
        print(f"{name:34}{''.join(columns)}")

    text = TextStates(torch.randn(*ids.shape, size.text_dim, device=device), torch.ones_like(ids, dtype=torch.bool))
    steps = (launched(partial(base.denoiser, noise.repeat(2, 1, 1, 1), ids[:, 0], text, side), device)
             for side in (branch, None))
    columns = (f"{start:12.4f} s{end:10.4f} s" for start, end in steps)
    print(f"{'a step is launched and done after':34}{''.join(columns)}", flush=True)
    before = [sum(taken.values()) for taken in times]

    def tell(name: str, seconds: list[float]) -> None:
        columns = (f"{s:10.3f} s{options.batch / s:6.1f}/s{s / first:6.0%}" for s, first in zip(seconds, before))
        print(f"{name:34}{''.join(columns)}", flush=True)

    def changed(name: str, **changes) -> None:
        tell(name, [meter.seconds(partial(one, **changes), options.repeat)["all"] for one in runs])

    def unmasked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    without_mask = partial(patch.object, layers, "attend", unmasked)
    tell("all of it", before)
    changed("without guidance", guidance=1)
    changed("without a mask of the words", within=without_mask)
    base.autoencoder.to(memory_format=torch.channels_last)
    changed("autoencoder in channels_last")
    for network in (base, branch):
        round_weights(network)
    changed("and weights in bf16")
    lower(base, branch)
    changed("and all in bf16, without a mask", autocast=False, within=without_mask)


def compare(side: Callable, size: DiffusionConfig, options: argparse.Namespace, device: torch.device,
            top: float) -> None:
    """Print a line for each mode and run of `side`, `ours` or `diffusers`; `top`: FLOP/s of a large product."""
    counted = []
    for mode in options.modes:
        runs = side(size, options, device, mode == "compiled")
        for i, title in enumerate(TITLES):
            if mode == options.modes[0]:
                with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                    runs[i]()
                counted.append(counter.get_total_flops())
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = seconds_of(runs[i], device, options.repeat)
            memory = (torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                      else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            print(f"{f'{side.__name__}, {title}, {mode}':50}{options.batch / taken:10.1f}{memory:8.2f}"
                  f"{counted[i] / taken / top:9.1%}", flush=True)
        del runs
        gc.collect()        # what comes next has the device's memory for itself


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
    size, top = dataclasses.replace(SIZES[options.size], vocab=1), ceiling(device)
    with torch.device("meta"):
        denoiser = Denoiser(size)
        del denoiser.text_encoder       # it is not counted, so any vocabulary will do
    print(f"{name}, {platform.processor() or platform.machine()}, torch {torch.__version__}; {options.size} "
          f"{size.height}x{size.width}, batch {options.batch}, {options.steps} DDIM steps; denoiser "
          f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M parameters, "
          f"branch {sum(p.numel() for p in DomainBranch(denoiser).parameters()) / 1e6:.1f} M; "
          f"matrix product {top / 1e12:.2g} TFLOP/s")
    print(f"{'':50}{'images/s':>10}{'GiB':>8}{'ceiling':>9}")
    sides = [ours]
    if size.stable and importlib.util.find_spec("diffusers"):
        sides.append(diffusers)
    elif size.stable:
        print("diffusers is not installed, so there is no comparison with it")
    for side in sides:
        compare(side, size, options, device, top)
    if size.stable and "eager" in options.modes:
        where(size, options, device)


if __name__ == "__main__":
    main()
