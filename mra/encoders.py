"""The three encoders of MRA (section 3): image E_V, text E_T and fusion E_F.

E_V is a vision transformer on rectangular images. E_T and E_F are the two halves of one BERT: the first
layers read the words alone, the last ones also attend to the image (text asks, image tokens answer).
Before: layers.py. After: losses.py, retriever.py.
"""

import torch
from torch import Tensor, nn

from mra.config import ModelConfig
from mra.layers import PostNormBlock, PreNormBlock


class ImageEncoder(nn.Module):
    """Image (B, 3, H, W), normalised -> tokens (B, 1+N, D); token 0, the whole image, is the mean of the patches.

    A region is the mean of its patches in the same way, so what the region losses teach the patches reaches the
    image feature; with a learned class token in place of the mean, it does not.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.image_dim
        self.patches = nn.Conv2d(3, dim, config.patch, config.patch)
        self.positions = nn.Parameter(torch.zeros(1, config.patch_count, dim))
        self.blocks = nn.ModuleList(PreNormBlock(dim, config.image_heads, config.dropout)
                                    for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)                   # (B, N, D), row by row
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return torch.cat([x.mean(1, keepdim=True), x], 1)                    # (B, 1+N, D)


class TextEncoder(nn.Module):
    """Word-piece ids (B, T) and keep (B, T) -> tokens (B, T, D); token 0 is [CLS]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.text_dim
        self.words = nn.Embedding(config.vocab, dim)
        self.positions = nn.Embedding(config.positions, dim)
        self.norm = nn.LayerNorm(dim, 1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PostNormBlock(dim, config.text_heads, config.dropout)
                                    for _ in range(config.text_depth))

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]          # (B, T, D)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, keep)
        return x                                                             # (B, T, D)


class FusionEncoder(nn.Module):
    """Text tokens (B, T, D) that look at image tokens (B, S, D') -> fused tokens at M positions (B, M, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            PostNormBlock(config.text_dim, config.text_heads, config.dropout, context_dim=config.image_dim)
            for _ in range(config.fusion_depth))

    def memories(self, image: Tensor) -> list[Tensor]:
        """Each block's keys and values of the image tokens, to be computed once and shared by every pass."""
        return [block.cross.memory(image) for block in self.blocks]

    def forward(self, x: Tensor, keep: Tensor, at: Tensor, memories: list[Tensor],
                image_keep: Tensor | None = None) -> Tensor:
        """Fused tokens at the positions `at` (B, M), (B, M, D); image_keep (B, S), True = may be looked at."""
        *blocks, last = zip(self.blocks, memories)
        for block, memory in blocks:
            x = block(x, keep, memory, image_keep)
        return last[0](x, keep, last[1], image_keep, at)                     # (B, M, D)
