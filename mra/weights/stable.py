"""Stable Diffusion 1.5 as the base of DaD: its weights in the folder layout of diffusers, its autoencoder, and CLIP.

The denoiser is ours, built with `stable` in its configuration. Prompts are read by CLIP's text side (Radford et al.
2021): a byte-level BPE, and a causal text transformer. Read next: run/networks.py.
"""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from mra.config import DiffusionConfig, UserError
from mra.diffusion.autoencoder import ResBlock, group_norm, upsample
from mra.diffusion.base import Diffusion
from mra.diffusion.denoiser import Denoiser
from mra.diffusion.noising import Schedule
from mra.layers import Attention, PreNormBlock, QuickGELU
from mra.weights.files import fill, in_folder, named

STABLE_SCALE = 0.18215          # makes the variance of Stable Diffusion's latents 1
CLIP_FILES = "vocab.json", "merges.txt"
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
CLIP_RULES = (
    (r"^text_model\.", ""), (r"^embeddings\.position_ids$", ""), (r"^embeddings\.token_embedding\.", "words."),
    (r"^embeddings\.position_embedding\.", "positions."), (r"^final_layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."))
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
    tokenizer = ClipTokenizer(folder / "tokenizer")
    size, schedule = replace(size, vocab=len(tokenizer)), Schedule.scaled_linear()
    with torch.device("meta"):      # without the time for random weights
        base = Diffusion(size, tokenizer, StableAutoencoder(size), Denoiser(size, CausalTextEncoder(size)), schedule)
    base.to_empty(device="cpu")
    unet = nn.ModuleDict(base.denoiser.named_children())
    text_encoder = unet.pop("text_encoder")
    for part, model, rules in (("unet", unet, UNET_RULES), ("vae", base.autoencoder, VAE_RULES),
                               ("text_encoder", text_encoder, CLIP_RULES)):
        path = in_folder(folder / part)
        fill(model, named(path, rules), path)
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
    """Stable Diffusion's (Rombach et al. 2022, KL-f8): images (B, 3, H, W) in -1..1 <-> latents (B, 4, H/8, W/8).

    Two blocks a level down, three up; between them a block, attention, a block. It adds no grain.
    """

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


class ClipTokenizer:
    """The BPE of a folder with vocab.json and merges.txt, with the interface of data/tokenizer.py's `Tokenizer`.

    CLIP marks the last piece of a word. In a causal encoder that piece has seen the others of its word, so
    `starts_word` is True there.
    """

    def __init__(self, folder: Path):
        try:
            self.engine = Engine(models.BPE.from_file(*(str(Path(folder) / name) for name in CLIP_FILES),
                                                      end_of_word_suffix="</w>"))
            ids = self.engine.get_vocab()
            self.start_id, self.pad_id = (ids[piece] for piece in ("<|startoftext|>", "<|endoftext|>"))
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("some ids are missing")
        except Exception as error:      # the engine raises nothing more special
            raise UserError(f"{folder}: no readable {' and '.join(CLIP_FILES)} of CLIP ({error}).") from None
        self.engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CLIP_WORD), "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        self.starts_word = np.array([piece.endswith("</w>") for piece in sorted(ids, key=ids.get)])     # (V,)

    def __len__(self) -> int:
        return len(self.starts_word)

    def encode(self, text: str, max_tokens: int = 77) -> list[int]:
        """<|startoftext|> pieces <|endoftext|>, at most `max_tokens` >= 2 ids."""
        text = text.encode("utf-8", "ignore").decode()
        return [self.start_id, *self.engine.encode(text).ids[:max_tokens - 2], self.pad_id]


class CausalTextEncoder(nn.Module):
    """Ids (B, T) and keep (B, T) -> states (B, 77, D) of a transformer whose tokens attend to those before them.

    Every sequence ends with the id that pads, so its last id is repeated up to 77 positions; keep is not used.
    """

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        dim = config.text_dim
        self.words, self.positions = nn.Embedding(config.vocab, dim), nn.Embedding(config.positions, dim)
        self.blocks = nn.ModuleList(PreNormBlock(dim, config.text_heads, config.dropout, 1e-5, True, QuickGELU)
                                    for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        missing = self.positions.num_embeddings - ids.shape[1]
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)           # (B, 77)
        x = self.words(ids) + self.positions.weight                          # (B, 77, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
