"""The released MRA models, number for number: how they differ from mra/retriever.py, their Swin, and their files.

A released file holds a Swin-B, BERT's layers as text and fusion encoder, and the heads. It becomes one of the presets
`swin` (384x256) or `swin-224`. Read next: retrievers.py, which loads any retriever.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import PRESETS, ModelConfig, UserError
from mra.layers import initialise
from mra.retriever import Retriever, pool_region
from mra.weights.files import fill, fitting, named
from mra.weights.pretrained import BERT_RULES, divided

RELEASED_RULES = (
    (r".*\.(relative_position_index|attn_mask)$", ""),      # they follow from the window
    (r"^vision_encoder\.", "image_encoder."), (r"\.patch_embed\.proj\.", ".patches."),
    (r"\.patch_embed\.norm\.", ".patch_norm."), (r"\.layers\.(\d)\.blocks\.", r".stages.\1."),
    (r"\.layers\.(\d)\.downsample\.", r".merges.\1."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^vision_proj\.", "image_projection."), (r"^text_proj\.", "text_projection."), (r"^temp$", "temperature"),
    (r"^itm_head\.", "matching_head."), *BERT_RULES)


class ReleasedRetriever(Retriever):
    """A retriever with what the released code does in its own way, as far as its configuration asks for it.

    window: the image encoder is a Swin transformer. bins: the projections read the means of equal stretches of tokens,
    padding of captions included, in place of token 0 alone. released_regions: the region's feature ignores its box,
    and the fusion encoder does not see the region's mean.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, SwinEncoder(config) if config.window else None)
        if config.bins:
            self.image_projection = binned_projection(config.bins * config.image_dim, config)
            self.text_projection = binned_projection((1 + config.bins) * config.text_dim, config)

    def image_feature(self, tokens: Tensor) -> Tensor:
        """Unit features (B, E) of tokens (B, 1+N, D)."""
        if not self.config.bins:
            return super().image_feature(tokens)
        return F.normalize(self.image_projection(binned(tokens[:, 1:], self.config.bins)), dim=-1)

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Word pieces (B, T) -> tokens (B, T, D) and unit features (B, E)."""
        if not self.config.bins:
            return super().encode_text(ids, keep)
        length = ids.shape[1]
        missing = self.config.max_tokens - length
        tokens = self.text_encoder(F.pad(ids, (0, missing)), F.pad(keep, (0, missing)))              # (B, 56, D)
        x = torch.cat([tokens[:, 0], binned(tokens[:, 1:], self.config.bins)], 1)                    # (B, (1+bins) D)
        return tokens[:, :length], F.normalize(self.text_projection(x), dim=-1)

    def encode_region(self, image: Tensor, region_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, 1+N, D) and the patches of a box (B, N) -> region tokens (B, 1+N, D), keep (B, 1+N), (B, E)."""
        region, keep = pool_region(image, region_keep)
        if self.config.released_regions:
            keep[:, 0] = False
            return region, keep, self.image_feature(image)
        inside = torch.where(keep[..., None], region, region[:, :1])        # the mean, so that no patch outside counts
        return region, keep, self.image_feature(inside)


def binned_projection(dim: int, config: ModelConfig) -> nn.Sequential:
    """Concatenated bins (B, dim) -> the contrastive space (B, E)."""
    made = nn.Sequential(nn.BatchNorm1d(dim), nn.Dropout(config.dropout), nn.Linear(dim, config.embed))
    return made.apply(initialise)


def binned(tokens: Tensor, bins: int) -> Tensor:
    """Tokens (B, N, D) -> the means of `bins` equal stretches, one after another (B, bins * D)."""
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), bins).transpose(1, 2).flatten(1)


# ---- the image encoder

class SwinEncoder(nn.Module):
    """Image (B, 3, H, W) -> tokens (B, 1+N, D) of a Swin transformer (Liu et al. 2021); token 0 is their mean.

    It has stages of 2, 2, depth - 6 and 2 blocks. Patches of 4 pixels attend within windows, every second block within
    shifted ones. Between stages 2 x 2 patches become one of twice the width, which is D in the last stage. A stage's
    window is the largest that tiles it: 8, but 4 for 12 x 8 patches.
    """

    def __init__(self, config: ModelConfig):
        from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock  # it takes two seconds
        super().__init__()
        dim, heads = config.image_dim // 8, config.image_heads // 8
        self.patches, self.patch_norm = nn.Conv2d(3, dim, config.patch // 8, config.patch // 8), nn.LayerNorm(dim)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        for stage, depth in enumerate((2, 2, config.image_depth - 6, 2)):
            side = math.gcd(config.window, *(8 // 2**stage * rows for rows in config.grid))
            self.stages.append(nn.Sequential(*(
                SwinTransformerBlock(dim << stage, heads << stage, [side, side], [i % 2 * (side // 2)] * 2,
                                     dropout=config.dropout) for i in range(depth))))
            self.merges.append(PatchMerging(dim << stage) if stage < 3 else nn.Identity())
        self.norm = nn.LayerNorm(config.image_dim)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_norm(self.patches(image).permute(0, 2, 3, 1))         # (B, rows, columns, D / 8)
        for stage, merge in zip(self.stages, self.merges):
            x = merge(stage(x))                                              # half the rows and columns, twice D
        x = self.norm(x).flatten(1, 2)                                       # (B, N, D)
        return torch.cat([x.mean(1, keepdim=True), x], 1)                    # (B, 1+N, D)


def resized_table(table: Tensor, to: int) -> Tensor:
    """Relative position biases ((2w-1)^2, heads) of windows of w patches -> (to^2, heads), as the released code does.

    Positions of the old table are spaced geometrically, near ones densely, so that both tables reach equally far
    (Swin's released fine-tuning code). Between them a cubic spline with not-a-knot ends interpolates, both ways.
    """
    side = math.isqrt(len(table))
    if side == to:
        return table
    ratio = geometric_ratio(side // 2, to // 2)
    steps = torch.tensor([ratio ** i for i in range(side // 2)], dtype=torch.float64).cumsum(0)
    x = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])               # (side,)
    at = torch.arange(-(to // 2), to // 2 + 1, dtype=torch.float64)          # (to,)

    def basis(points: Tensor) -> Tensor:
        """Of piecewise cubics with a knot at every x but the outer two at each end."""
        powers = [points ** power for power in range(4)]
        return torch.stack(powers + [(points - knot).clamp(min=0) ** 3 for knot in x[2:-2]], 1)

    spline = basis(at.clamp(x[0], x[-1])) @ torch.linalg.inv(basis(x))       # (to, side)
    square = table.detach().cpu().double().view(side, side, -1)
    return torch.einsum("ai,bj,ijh->abh", spline, spline, square).flatten(0, 1).to(table.dtype)


def geometric_ratio(terms: int, reach: int) -> float:
    """The ratio in 1.01 .. 1.5 with which that many terms, the first being 1, add up to `reach`; by bisection."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(ratio ** i for i in range(terms)) > reach else (ratio, high)
    return ratio


# ---- the files

def read_released(path: Path) -> tuple[ReleasedRetriever, dict]:
    """The model of a released checkpoint, and the facts of a checkpoint of ours: its clean score is the matching logit.

    Raises UserError where the file is none of the released models.
    """
    tensors = named(path, RELEASED_RULES)
    with fitting(path):
        rows, _ = tensors["image_encoder.stages.0.0.attn.relative_position_bias_table"].shape
        preset = {225: "swin", 169: "swin-224"}.get(rows)                    # windows of 8 or 7 patches
        if preset is None:
            raise UserError(f"{path}: {rows} relative positions; the released models' windows have 225 or 169.")
        tensors = divided(tensors, PRESETS[preset].text_depth, path)
        config = replace(PRESETS[preset], vocab=len(tensors["text_encoder.words.weight"]))
        if "image_projection.weight" in tensors:        # the model for RSTPReid, which also re-ranks more candidates
            config = replace(config, bins=0, embed=len(tensors["image_projection.weight"]), rerank=1000)
    model = ReleasedRetriever(config)
    fill(model, tensors, path)
    train = {"preset": preset, "dataset": "sda" if preset == "swin-224" else "", "seed": "unknown",
             "data_root": "real data"}
    return model, {"train": train, "val": {"weight": 0.0}, "pretrained_on": "sda"}
