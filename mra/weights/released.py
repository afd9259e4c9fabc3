"""The released MRA models, number for number: how they differ from mra/retriever.py, and their Swin.

They are the presets `swin` (384x256) and `swin-224`. Read next: retrievers.py, which reads their files.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra.config import ModelConfig
from mra.layers import initialise
from mra.retriever import Retriever, pool_region


class BinnedRetriever(Retriever):
    """A retriever whose projections read the means of `bins` equal stretches of tokens, not token 0 alone.

    Captions are padded to full length for it. The released model for RSTPReid has no bins.
    """

    def __init__(self, config: ModelConfig, image_encoder: nn.Module | None):
        super().__init__(config, image_encoder)
        self.image_projection = binned_projection(config.bins * config.image_dim, config)
        self.text_projection = binned_projection((1 + config.bins) * config.text_dim, config)
        self.text_encoder.words.padding_idx = 0         # padding is pooled, but gives its embedding no gradient

    def image_feature(self, tokens: Tensor) -> Tensor:
        """Unit features (B, E) of tokens (B, 1+N, D); token 0 is not read."""
        return F.normalize(self.image_projection(binned(tokens[:, 1:], self.config.bins)), dim=-1)

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Word pieces (B, T) -> tokens (B, T, D) and unit features (B, E)."""
        length = ids.shape[1]
        missing = self.config.max_tokens - length
        tokens = self.text_encoder(F.pad(ids, (0, missing)), F.pad(keep, (0, missing)))              # (B, 56, D)
        x = torch.cat([tokens[:, 0], binned(tokens[:, 1:], self.config.bins)], 1)                    # (B, (1+bins) D)
        return tokens[:, :length], F.normalize(self.text_projection(x), dim=-1)

    def encode_region(self, tokens: Tensor, region_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Retriever`; for the feature, the region's mean takes the place of the patches outside it."""
        region, keep = pool_region(tokens, region_keep)
        inside = torch.where(keep[..., None], region, region[:, :1])
        return region, keep, self.image_feature(inside)


def binned_projection(dim: int, config: ModelConfig) -> nn.Sequential:
    """Concatenated bins (B, dim) -> the contrastive space (B, E)."""
    layers = nn.BatchNorm1d(dim), nn.Dropout(config.dropout), nn.Linear(dim, config.embed)
    return nn.Sequential(*layers).apply(initialise)


def binned(tokens: Tensor, bins: int) -> Tensor:
    """Tokens (B, N, D) -> the means of `bins` equal stretches, one after another (B, bins * D)."""
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), bins).transpose(1, 2).flatten(1)


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
