"""The denoiser, and the two kinds of branch that adapt it to a domain (MRA section 2).

The denoiser is a U-Net in the block layout of Stable Diffusion 1.5. Each level has two residual blocks in the encoder
and three in the decoder. A transformer follows each block, except at the lowest resolution: pixels attend to each
other and to the caption. The middle is block, transformer, block. Read next: base.py.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mra.config import DiffusionConfig
from mra.diffusion.autoencoder import ResBlock, group_norm, upsample, zero
from mra.encoders import TextEncoder
from mra.layers import GEGLU, Attention, initialise

STABLE_EPS = 1e-5       # in the norms of Stable Diffusion's denoiser, except those before a transformer


@dataclass(frozen=True)
class TextStates:
    """Encoded captions: states (B, T, D) and keep (B, T), True = attend to it."""
    states: Tensor
    keep: Tensor

    def __getitem__(self, index) -> "TextStates":
        return TextStates(self.states[index], self.keep[index])


class SpatialTransformer(nn.Module):
    """Pixels (B, C, h, w) attend to each other, then to the caption; then an MLP; a skip around all of it."""

    def __init__(self, dim: int, config: DiffusionConfig):
        super().__init__()
        heads, bias = config.heads, not config.stable
        self.norm, self.to_in, self.to_out = group_norm(dim), nn.Conv2d(dim, dim, 1), zero(nn.Conv2d(dim, dim, 1))
        self.self_norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads, bias=bias)
        self.cross_norm, self.cross = nn.LayerNorm(dim), Attention(dim, heads, config.text_dim, bias)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), GEGLU(dim, 4 * dim)

    def forward(self, x: Tensor, text: TextStates) -> Tensor:
        tokens = self.to_in(self.norm(x)).flatten(2).transpose(1, 2)                          # (B, h*w, C)
        tokens = tokens + self.attention(self.self_norm(tokens))
        tokens = tokens + self.cross(self.cross_norm(tokens), self.cross.keys_values(text.states), text.keep)
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return x + self.to_out(tokens.transpose(1, 2).reshape(x.shape))                       # (B, C, h, w)


class Stage(nn.Module):
    """A residual block and, if it `attends`, a transformer; both start as their skip."""

    def __init__(self, dim_in: int, dim_out: int, embedding: int, config: DiffusionConfig, attends: bool):
        super().__init__()
        if config.stable:
            norms = group_norm(dim_in, eps=STABLE_EPS), group_norm(dim_out, eps=STABLE_EPS)
        else:   # the second norm has wide groups: over few channels it would remove the embedding again
            norms = group_norm(dim_in), group_norm(dim_out, least=8)
        self.block = ResBlock(dim_in, dim_out, embedding, *norms)
        zero(self.block.conv2)
        self.transformer = SpatialTransformer(dim_out, config) if attends else None

    def forward(self, x: Tensor, embedding: Tensor, text: TextStates) -> Tensor:
        x = self.block(x, embedding)
        return x if self.transformer is None else self.transformer(x, text)


class Encoder(nn.Module):
    """The U-Net's encoder and middle, with the embedding of the noise level."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        widths, embedding = config.widths, 4 * config.widths[0]
        self.level = nn.Sequential(nn.Linear(widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.first = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.stages, self.skip_dims, dim = nn.ModuleList(), [widths[0]], widths[0]
        for i, width in enumerate(widths):
            lowest = i + 1 == len(widths)
            self.stages.append(Stage(dim, width, embedding, config, not lowest))
            self.stages.append(Stage(width, width, embedding, config, not lowest))
            self.skip_dims += [width, width]
            if not lowest:
                self.stages.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                self.skip_dims.append(width)
            dim = width
        self.middle = nn.ModuleList(Stage(dim, dim, embedding, config, attends) for attends in (True, False))

    def embed(self, t: Tensor) -> Tensor:
        """Noise levels t (B,) -> embedding (B, D): sines and cosines of frequencies 1 to 1/10,000, then an MLP."""
        half = self.skip_dims[0] // 2
        angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        return self.level(torch.cat([angle.cos(), angle.sin()], 1))

    def forward(self, z: Tensor, embedding: Tensor, text: TextStates) -> list[Tensor]:
        """The skips from the first to the lowest, then the middle."""
        x = self.first(z.contiguous(memory_format=torch.channels_last))       # faster convolutions
        outputs = [x]
        for stage in self.stages:
            x = stage(x, embedding, text) if isinstance(stage, Stage) else stage(x)
            outputs.append(x)
        for stage in self.middle:
            x = stage(x, embedding, text)
        return [*outputs, x]


class Denoiser(nn.Module):
    """Latents (B, C, h, w) at noise levels t (B,), and text -> v or the noise (B, C, h, w), as the schedule says."""

    def __init__(self, config: DiffusionConfig, text_encoder: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.text_encoder = text_encoder or TextEncoder(config)
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
        zero(self.last[-1])     # v starts as 0

    def encode_text(self, ids: Tensor, keep: Tensor) -> TextStates:
        """Encode word pieces (B, T). Stable Diffusion takes 77 of them, and also attends to the padding."""
        if self.config.stable:
            missing = self.config.positions - ids.shape[1]
            ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)       # each text ends with the id that pads
            keep = keep.new_ones(ids.shape)
        return TextStates(self.text_encoder(ids, keep), keep)

    def forward(self, z: Tensor, t: Tensor, text: TextStates, branch: "DomainBranch | None" = None) -> Tensor:
        """What a `branch` returns is added to the skips and the middle."""
        return self.last(self.activations(z, t, text, branch)[-1])                            # (B, C, h, w)

    def activations(self, z: Tensor, t: Tensor, text: TextStates, branch: "DomainBranch | None" = None) -> list[Tensor]:
        """What `forward` computes on its way: the skips, the middle, and the last level (B, C', h', w')."""
        embedding = self.encoder.embed(t)                                                     # (B, D)
        outputs = self.encoder(z, embedding, text)
        if branch is not None:
            outputs = [own + added for own, added in zip(outputs, branch(z, t, text))]
        *skips, x = outputs
        for i, stage in enumerate(self.stages):
            x = stage(torch.cat([x, skips.pop()], 1), embedding, text)
            if i % 3 == 2:                      # the last stage of a level
                x = self.ups[i // 3](x)
        return [*outputs, x]


class DomainBranch(nn.Module):
    """The paper's branch: a trainable copy of a denoiser's encoder and middle (ControlNet, Zhang et al. 2023).

    Its outputs leave through convolutions that start at zero. The paper's white condition would only add a constant.
    """

    def __init__(self, base: Denoiser):
        super().__init__()
        self.encoder = copy.deepcopy(base.encoder).requires_grad_(True)
        dims = [*base.encoder.skip_dims, base.config.widths[-1]]
        self.outputs = nn.ModuleList(zero(nn.Conv2d(dim, dim, 1)) for dim in dims)

    def forward(self, z: Tensor, t: Tensor, text: TextStates) -> list[Tensor]:
        """What a denoiser adds to its skips and middle."""
        outputs = self.encoder(z, self.encoder.embed(t), text)
        return [convolution(x) for convolution, x in zip(self.outputs, outputs)]


class LowRank(nn.Module):
    """What a branch adds to a frozen weight (O, ...): a matrix of low rank, zero at first (LoRA, Hu et al. 2022)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.first = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.last = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_normal_(self.first, nonlinearity="linear")

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.last @ self.first).view_as(weight)


class Shift(nn.Module):
    """What a branch adds to a frozen bias (O,): a vector, zero at first."""

    def __init__(self, bias: Tensor):
        super().__init__()
        self.by = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: Tensor) -> Tensor:
        return bias + self.by


def low_rank_branch(base: Denoiser, rank: int) -> tuple[Denoiser, nn.ModuleList]:
    """A copy of the denoiser, and what is added to the weights and biases of its convolutions and linear layers.

    Only that is trained. Unlike the paper's branch it reaches the U-Net's decoder, too; the text encoder has none.
    """
    adapted = copy.deepcopy(base).requires_grad_(False)
    added = nn.ModuleList()
    for name, layer in list(adapted.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.startswith("text_encoder."):
            added.append(LowRank(layer.weight, rank))
            parametrize.register_parametrization(layer, "weight", added[-1])
            if layer.bias is not None:
                added.append(Shift(layer.bias))
                parametrize.register_parametrization(layer, "bias", added[-1])
    return adapted, added


def merge(adapted: Denoiser) -> None:
    """Replace the frozen weights by the sums, in place. `adapted` is then as fast as the base."""
    for layer in list(adapted.modules()):
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(layer, name):
                parametrize.remove_parametrizations(layer, name)
