"""Stable Diffusion 1.5 as the base of DaD: its weights in the folder layout of diffusers, and its autoencoder.

The denoiser is ours, built with `stable` in its configuration. CLIP's text side (clip.py) reads the prompts.
"""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mra.config import DiffusionConfig
from mra.diffusion.autoencoder import ResBlock, group_norm, upsample
from mra.diffusion.base import Diffusion
from mra.diffusion.denoiser import Denoiser
from mra.diffusion.noising import Schedule
from mra.layers import Attention
from mra.weights.clip import CausalTextEncoder, ClipTokenizer
from mra.weights.files import fill, named, read

STABLE_SCALE = 0.18215          # makes the variance of Stable Diffusion's latents 1


def read_stable(folder: Path, size: DiffusionConfig) -> Diffusion:
    """The base in a folder with unet/, vae/, text_encoder/ and tokenizer/. Raises UserError where it does not fit."""
    tokenizer = ClipTokenizer.read(folder / "tokenizer")
    size, schedule = replace(size, vocab=len(tokenizer)), Schedule.scaled_linear()
    with torch.device("meta"):      # without the time for random weights
        base = Diffusion(size, tokenizer, StableAutoencoder(size), Denoiser(size, CausalTextEncoder(size)), schedule)
    base.to_empty(device="cpu")
    unet = nn.ModuleDict(base.denoiser.named_children())
    text = nn.ModuleDict({"text_encoder": unet.pop("text_encoder")})
    for part, model, *kinds in (("unet", unet, "unet"), ("vae", base.autoencoder, "vae"),
                                ("text_encoder", text, "prompt", "clip text")):
        fill(model, named(read(folder / part), folder / part, *kinds), folder / part)
    return base


class PixelAttention(nn.Module):
    """Pixels (B, C, h, w) attend to each other, with one head, beside a skip."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.attention = group_norm(dim), Attention(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))                      # (B, h*w, C)
        return x + tokens.transpose(1, 2).reshape(x.shape)


class StableAutoencoder(nn.Module):
    """Stable Diffusion's (Rombach et al. 2022, KL-f8): images (B, 3, H, W) in -1..1 <-> latents (B, 4, H/8, W/8)."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.factor, widths, latent = config.factor, config.autoencoder, config.latent
        first, lowest = widths[0], widths[-1]

        def block(dim_in: int, dim: int) -> ResBlock:
            return ResBlock(dim_in, dim, norm1=group_norm(dim_in), norm2=group_norm(dim))

        def middle() -> nn.Sequential:
            return nn.Sequential(block(lowest, lowest), PixelAttention(lowest), block(lowest, lowest))

        down, up = nn.Sequential(), nn.Sequential()
        for above, dim in zip((first, *widths), widths):
            halve = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
            down.append(nn.Sequential(block(above, dim), block(dim, dim), halve))
        for below, dim in zip((lowest, *widths[::-1]), widths[::-1]):
            up.append(nn.Sequential(block(below, dim), block(dim, dim), block(dim, dim), upsample(dim)))
        del down[-1][-1], up[-1][-1]        # the last level has nothing below or above it
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(3, first, 3, padding=1), down_blocks=down, mid_block=middle(),
            conv_norm_out=group_norm(lowest), activation=nn.SiLU(),
            conv_out=nn.Conv2d(lowest, 2 * latent, 3, padding=1), quant_conv=nn.Conv2d(2 * latent, 2 * latent, 1)))
        self.decoder = nn.Sequential(OrderedDict(
            post_quant_conv=nn.Conv2d(latent, latent, 1), conv_in=nn.Conv2d(latent, lowest, 3, padding=1),
            mid_block=middle(), up_blocks=up, conv_norm_out=group_norm(first), activation=nn.SiLU(),
            conv_out=nn.Conv2d(first, 3, 3, padding=1)))

    def encode(self, image: Tensor) -> Tensor:
        """The mean latents of an image, scaled."""
        mean, _ = self.encoder(image).chunk(2, 1)
        return STABLE_SCALE * mean

    def decode(self, latents: Tensor, _: Tensor | None = None) -> Tensor:
        """The image of scaled latents. The second argument, from which `Autoencoder` makes grain, is not used."""
        return self.decoder(latents / STABLE_SCALE)
