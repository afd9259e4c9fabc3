"""Stable Diffusion 1.5 as the base of DaD: its weights in the folder layout of diffusers, and its autoencoder.

The denoiser is ours, built with `stable` in its configuration. CLIP's text side (clip.py) reads the prompts. Read next:
run/networks.py.
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
from mra.weights.clip import TEXT_RULES, CausalTextEncoder, ClipTokenizer
from mra.weights.files import fill, named, read

STABLE_SCALE = 0.18215          # makes the variance of Stable Diffusion's latents 1
PROMPT_RULES = (r"^(text_model\.)?", "text_encoder."), *TEXT_RULES, (r"^text_encoder\.", "")
UNET_RULES = (
    (r"^time_embedding\.linear_1\.", "encoder.level.0."), (r"^time_embedding\.linear_2\.", "encoder.level.2."),
    (r"^conv_in\.", "encoder.first."), (r"^conv_norm_out\.", "last.0."), (r"^conv_out\.", "last.2."),
    (r"\.time_emb_proj\.", ".modulation."), (r"\.conv_shortcut\.", ".skip."),
    (r"^up_blocks\.(\d)\.upsamplers\.0\.conv\.", r"ups.\1.1."), (r"\.downsamplers\.0\.conv\.", ".2."),
    (r"\.resnets\.(\d)\.", r".\1.block."), (r"\.attentions\.(\d)\.", r".\1.transformer."),
    (r"^mid_block\.", "encoder.middle."),
    # ours stand in one list, three to a level
    *((rf"^down_blocks\.{i // 3}\.{i % 3}\.", f"encoder.stages.{i}.") for i in range(12)),
    *((rf"^up_blocks\.{i // 3}\.{i % 3}\.", f"stages.{i}.") for i in range(12)),
    (r"\.proj_in\.", ".to_in."), (r"\.proj_out\.", ".to_out."), (r"\.transformer_blocks\.0\.", "."),
    (r"\.transformer\.norm1\.", ".transformer.self_norm."), (r"\.transformer\.norm2\.", ".transformer.cross_norm."),
    (r"\.transformer\.norm3\.", ".transformer.mlp_norm."), (r"\.attn1\.", ".attention."), (r"\.attn2\.", ".cross."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.to_hidden."), (r"\.ff\.net\.2\.", ".mlp.to_out."))
VAE_RULES = (
    (r"^quant_conv\.", "encoder.quant_conv."), (r"^post_quant_conv\.", "decoder.post_quant_conv."),
    (r"\.mid_block\.resnets\.1\.", ".mid_block.2."), (r"\.resnets\.(\d)\.", r".\1."),
    (r"\.attentions\.0\.group_norm\.", ".1.norm."), (r"\.attentions\.0\.", ".1.attention."),
    (r"\.downsamplers\.0\.conv\.", ".2.1."), (r"\.upsamplers\.0\.conv\.", ".3.1."),
    (r"\.conv_shortcut\.", ".skip."))


def read_stable(folder: Path, size: DiffusionConfig) -> Diffusion:
    """The base in a folder with unet/, vae/, text_encoder/ and tokenizer/. Raises UserError where it does not fit."""
    tokenizer = ClipTokenizer.read(folder / "tokenizer")
    size, schedule = replace(size, vocab=len(tokenizer)), Schedule.scaled_linear()
    with torch.device("meta"):      # without the time for random weights
        base = Diffusion(size, tokenizer, StableAutoencoder(size), Denoiser(size, CausalTextEncoder(size)), schedule)
    base.to_empty(device="cpu")
    unet = nn.ModuleDict(base.denoiser.named_children())
    text_encoder = unet.pop("text_encoder")
    for part, model, rules in (("unet", unet, UNET_RULES), ("vae", base.autoencoder, VAE_RULES),
                               ("text_encoder", text_encoder, PROMPT_RULES)):
        fill(model, named(read(folder / part), rules, folder / part), folder / part)
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
