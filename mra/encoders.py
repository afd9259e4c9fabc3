"""The three encoders of MRA (section 3): image E_V, text E_T and fusion E_F.

E_V is a vision transformer on rectangular images, or a Swin transformer as in the released models. E_T and E_F are the
two halves of one BERT: the first layers read the words alone, the last ones also attend to the image (text asks, image
tokens answer). Before: layers.py. After: losses.py, retriever.py.
"""

import math

import torch
from torch import Tensor, nn

from mra.config import ModelConfig
from mra.layers import PostNormBlock, PreNormBlock, QuickGELU, pick


class ImageEncoder(nn.Module):
    """Image (B, 3, H, W), normalised -> tokens (B, 1+N, D); token 0, the whole image, is the mean of the patches.

    A region is the mean of its patches in the same way, so what the region losses teach the patches reaches the
    image feature; with a learned class token in place of the mean, it does not. `class_token` adds that token of
    pretrained transformers for the patches to look at, and leaves the mean in its place.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.image_dim
        self.patches = nn.Conv2d(3, dim, config.patch, config.patch)
        self.positions = nn.Parameter(torch.zeros(1, config.patch_count, dim))
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.blocks = nn.ModuleList(PreNormBlock(dim, config.image_heads, config.dropout)
                                    for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions  # (B, N, D), row by row
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(len(x), 1, -1)], 1)    # (B, N+1, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, :self.positions.shape[1]])
        return torch.cat([x.mean(1, keepdim=True), x], 1)                    # (B, 1+N, D)


class SwinEncoder(nn.Module):
    """The same from a Swin transformer (Liu et al. 2021): stages of 2, 2, depth - 6 and 2 blocks of torchvision.

    Patches of 4 pixels attend within windows, every second block within shifted ones; between stages 2 x 2 patches
    become one of twice the width, D at last. A stage's window is the largest that tiles it: 8, but 4 for 12 x 8.
    """

    def __init__(self, config: ModelConfig):
        # here, since it takes two seconds that no other encoder needs
        from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
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


class TextEncoder(nn.Module):
    """Word-piece ids (B, T) and keep (B, T) -> tokens (B, T, D); token 0 is [CLS]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim = config.text_dim
        self.words, self.positions = nn.Embedding(config.vocab, dim), nn.Embedding(config.positions, dim)
        self.norm, self.dropout = nn.LayerNorm(dim, 1e-12), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PostNormBlock(dim, config.text_heads, config.dropout)
                                    for _ in range(config.text_depth))

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]          # (B, T, D)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, keep)
        return x                                                             # (B, T, D)


class CausalTextEncoder(nn.Module):
    """The same as CLIP's text transformer (Radford et al. 2021): a token sees those before it, and all positions count.

    Captions (B, T), each with its last id filled up, go on with that id to all the positions: (B, 77, D).
    """

    def __init__(self, config: ModelConfig):
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

    def begin(self, x: Tensor, keep: Tensor) -> Tensor:
        """The part that sees no image, (B, T, D): to be computed once for all images that the words meet."""
        return self.blocks[0].read(x, keep)

    def forward(self, x: Tensor, keep: Tensor, at: Tensor, memories: list[Tensor],
                image_keep: Tensor | None = None, begun: bool = False) -> Tensor:
        """Fused tokens (B, M, D) at the positions `at` (B, M); image_keep (B, S). If `begun`, x is from `begin`."""
        for i, (block, memory) in enumerate(zip(self.blocks, memories)):
            here = at if i + 1 == len(self.blocks) else None
            if begun and i == 0:
                x = block.look(x if here is None else pick(x, here), memory, image_keep)
            else:
                x = block(x, keep, memory, image_keep, here)
        return x                                                             # (B, M, D)
