"""The denoiser and the domain branch beside it: DaD's two networks (MRA section 2).

The denoiser is a U-Net in the block layout of Stable Diffusion 1.5: at each level two residual blocks on the way
down and three on the way up, each followed by a transformer that looks at itself and at the caption, except at the
lowest resolution; between them a middle of block, transformer, block. The branch is a trainable copy of the way down
and the middle (Zhang et al. 2023, ControlNet). What it finds is added to the skips and to the middle of the frozen
denoiser through convolutions that start at zero, so that an untrained branch changes nothing.
Before: autoencoder.py, noising.py. After: sampling.py.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mra.config import DiffusionConfig
from mra.diffusion.autoencoder import ResBlock, group_norm, upsample, zero
from mra.encoders import CausalTextEncoder, TextEncoder
from mra.layers import GEGLU, Attention, initialise

STABLE_EPS = 1e-5       # of the norms of Stable Diffusion's denoiser, but those before a transformer


@dataclass(frozen=True)
class Prompt:
    """Encoded captions: states (B, T, D) and keep (B, T), True = a word."""

    states: Tensor
    keep: Tensor

    def __getitem__(self, index) -> "Prompt":
        return Prompt(self.states[index], self.keep[index])


class SpatialTransformer(nn.Module):
    """Pixels (B, C, h, w) attend to each other, then to the caption, then an MLP; added to what came in."""

    def __init__(self, dim: int, config: DiffusionConfig):
        super().__init__()
        heads, bias = config.heads, not config.stable
        self.norm, self.to_in, self.to_out = group_norm(dim), nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.self_norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads, bias=bias)
        self.cross_norm, self.cross = nn.LayerNorm(dim), Attention(dim, heads, config.text_dim, bias)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), GEGLU(dim, 4 * dim)

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        tokens = self.to_in(self.norm(x)).flatten(2).transpose(1, 2)                          # (B, h*w, C)
        tokens = tokens + self.attention(self.self_norm(tokens))
        tokens = tokens + self.cross(self.cross_norm(tokens), self.cross.memory(prompt.states), prompt.keep)
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return x + self.to_out(tokens.transpose(1, 2).reshape(x.shape))                       # (B, C, h, w)


class Stage(nn.Module):
    """A residual block and, where the resolution is not the lowest, a transformer.

    With `recompute` it keeps no activations for the backward pass, which makes them anew (Chen et al. 2016).
    """

    recompute = False

    def __init__(self, dim_in: int, dim_out: int, embedding: int, config: DiffusionConfig, attends: bool):
        super().__init__()
        self.block = ResBlock(dim_in, dim_out, embedding, STABLE_EPS if config.stable else 0)
        self.transformer = SpatialTransformer(dim_out, config) if attends else None

    def forward(self, x: Tensor, embedding: Tensor, prompt: Prompt) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, embedding, prompt, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, embedding, prompt)

    def compute(self, x: Tensor, embedding: Tensor, prompt: Prompt) -> Tensor:
        x = self.block(x, embedding)
        return x if self.transformer is None else self.transformer(x, prompt)


class Encoder(nn.Module):
    """The way down and the middle, with the embedding of the noise level."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, embedding = config.widths, 4 * config.widths[0]
        self.level = nn.Sequential(nn.Linear(widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.first = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.stages, self.skip_dims, dim = nn.ModuleList(), [widths[0]], widths[0]
        for i, width in enumerate(widths):
            lowest = i + 1 == len(widths)
            self.stages.extend(Stage(above, width, embedding, config, not lowest) for above in (dim, width))
            self.stages.extend([] if lowest else [nn.Conv2d(width, width, 3, stride=2, padding=1)])
            self.skip_dims += [width] * (2 if lowest else 3)
            dim = width
        self.middle = nn.ModuleList(Stage(dim, dim, embedding, config, attends) for attends in (True, False))

    def embed(self, t: Tensor) -> Tensor:
        """Noise levels t (B,) -> embedding (B, 4 C): sines and cosines of wavelengths up to 10,000, and an MLP."""
        half = self.level[0].in_features // 2
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        return self.level(torch.cat([angle.cos(), angle.sin()], 1))

    def forward(self, z: Tensor, embedding: Tensor, prompt: Prompt, hint: Tensor | None = None) -> list[Tensor]:
        """The skips, from the first to the lowest, and last the middle; `hint` (B, C, h, w) joins the first."""
        x = self.first(z.contiguous(memory_format=torch.channels_last))
        x = x if hint is None else x + hint
        found = [x]
        for stage in self.stages:
            found.append(x := stage(x, embedding, prompt) if isinstance(stage, Stage) else stage(x))
        for stage in self.middle:
            x = stage(x, embedding, prompt)
        return [*found, x]


class Denoiser(nn.Module):
    """Latents (B, C, h, w) at noise levels t (B,) and a prompt -> v (B, C, h, w), or the noise: the schedule says."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.text_encoder = (CausalTextEncoder if config.stable else TextEncoder)(config)
        self.encoder = Encoder(config)
        embedding, dims, dim = 4 * config.widths[0], list(self.encoder.skip_dims), config.widths[-1]
        self.stages, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, width in reversed(list(enumerate(config.widths))):
            for _ in range(3):
                self.stages.append(Stage(dim + dims.pop(), width, embedding, config, i + 1 < len(config.widths)))
                dim = width
            self.ups.append(upsample(dim) if i else nn.Identity())
        norm = group_norm(dim, eps=STABLE_EPS if config.stable else 1e-6)
        self.last = nn.Sequential(norm, nn.SiLU(), nn.Conv2d(dim, config.latent, 3, padding=1))
        self.text_encoder.apply(initialise)
        for module in self.modules():    # every block starts as the identity, and v as 0
            if isinstance(module, ResBlock | SpatialTransformer):
                zero(module.conv2 if isinstance(module, ResBlock) else module.to_out)
        zero(self.last[-1])

    def read(self, ids: Tensor, keep: Tensor) -> Prompt:
        """Word pieces (B, T) -> an encoded prompt. Stable Diffusion also looks at what CLIP makes of the padding."""
        states = self.text_encoder(ids, keep)
        return Prompt(states, keep.new_ones(states.shape[:2]) if self.config.stable else keep)

    def forward(self, z: Tensor, t: Tensor, prompt: Prompt, control: list[Tensor] | None = None) -> Tensor:
        """`control`, from a branch, is added to the skips and the middle."""
        embedding = self.encoder.embed(t)
        found = self.encoder(z, embedding, prompt)
        *skips, x = found if control is None else [a + b for a, b in zip(found, control)]
        for i, stage in enumerate(self.stages):
            x = stage(torch.cat([x, skips.pop()], 1), embedding, prompt)
            x = self.ups[i // 3](x) if i % 3 == 2 else x
        return self.last(x)


class DomainBranch(nn.Module):
    """The trainable copy of a denoiser's encoder, its domain embedding and its zero convolutions.

    The condition (B, 1, H, W) is all ones (as in the paper: the branch learns the target's look alone) or a map of the
    image that no domain shows in, such as `structure`; it enters through a zero convolution of its own.
    """

    def __init__(self, base: Denoiser):
        super().__init__()
        self.encoder = copy.deepcopy(base.encoder).requires_grad_(True)
        dims = [*base.encoder.skip_dims, base.config.widths[-1]]
        self.domain = nn.Parameter(torch.zeros(4 * base.config.widths[0]))
        self.fold = nn.PixelUnshuffle(base.config.factor)
        self.condition = zero(nn.Conv2d(base.config.factor**2, dims[0], 1))
        self.outputs = nn.ModuleList(zero(nn.Conv2d(dim, dim, 1)) for dim in dims)

    def forward(self, z: Tensor, t: Tensor, prompt: Prompt, condition: Tensor) -> list[Tensor]:
        """What to add to the base's skips and middle."""
        embedding = self.encoder.embed(t) + self.domain
        found = self.encoder(z, embedding, prompt, self.condition(self.fold(condition)))
        return [output(x) for output, x in zip(self.outputs, found)]


def round_weights(network: nn.Module) -> None:
    """Keep in bf16 the weights that autocast would round at every use: half the memory, the same results."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)


def structure(image: Tensor) -> Tensor:
    """Edges of images (B, 3, H, W) -> (B, 1, H, W) in 0..1, each divided by the strength of the edges around it.

    Light, colour and contrast of the domain drop out; where things end stays.
    """
    grey = F.pad(image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2], grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    strength = (across**2 + down**2).sqrt()
    around = F.avg_pool2d(strength, 9, 1, 4, count_include_pad=False)
    return strength / (strength + 2 * around + 0.02)
