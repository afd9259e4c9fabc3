"""The three encoders of MRA (section 3): image E_V, text E_T and fusion E_F.

E_V is a vision transformer on rectangular images. E_T and E_F are the two halves of one BERT: the first layers read the
words alone, the last ones also attend to the image. Read next: losses.py, retriever.py.
"""

import torch
from torch import Tensor, nn

from mra.config import DiffusionConfig, ModelConfig
from mra.layers import PostNormBlock, PreNormBlock, QuickGELU, pick


class ImageEncoder(nn.Module):
    """Image (B, 3, H, W), normalised -> tokens (B, 1+N, D); token 0, the whole image, is the mean of the patches.

    The feature of a region is the mean of its patches too, so the region losses also teach the image feature. With
    `class_token` the patches also attend to the class token of a pretrained transformer; token 0 stays the mean. With
    `clip` token 0 is the class token, as CLIP was trained: a region of all patches has another feature than the image.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        dim, self.clip = config.image_dim, config.clip
        eps, activation = (1e-5, QuickGELU) if self.clip else (1e-6, nn.GELU)
        self.patches = nn.Conv2d(3, dim, config.patch, config.patch, bias=not self.clip)
        self.positions = nn.Parameter(torch.zeros(1, *config.grid, dim).flatten(1, 2))
        has_class = config.class_token or self.clip
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_class else None
        self.first_norm = nn.LayerNorm(dim, eps) if self.clip else nn.Identity()
        self.blocks = nn.ModuleList(PreNormBlock(dim, config.image_heads, config.dropout, eps, activation=activation)
                                    for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions  # (B, N, D), row by row
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(len(x), 1, -1)], 1)    # (B, N+1, D)
        x = self.first_norm(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        patches = x[:, :self.positions.shape[1]]                             # (B, N, D)
        first = x[:, -1:] if self.clip else patches.mean(1, keepdim=True)    # (B, 1, D)
        return torch.cat([first, patches], 1)                                # (B, 1+N, D)


class TextEncoder(nn.Module):
    """Word-piece ids (B, T) and keep (B, T) -> tokens (B, T, D); token 0 is [CLS]."""

    def __init__(self, config: DiffusionConfig | ModelConfig):
        super().__init__()
        dim = config.text_dim
        self.words, self.positions = nn.Embedding(config.vocab, dim), nn.Embedding(config.positions, dim)
        self.norm, self.dropout = nn.LayerNorm(dim, 1e-12), nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PostNormBlock(dim, config.text_heads, config.dropout)
                                    for _ in range(config.text_depth))

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.words(ids) + self.positions.weight[:ids.shape[1]]))          # (B, T, D)
        for block in self.blocks:
            x = block(x, keep)
        return x


class FusionEncoder(nn.Module):
    """Text tokens (B, T, D) attend to image tokens (B, S, D') -> fused tokens (B, M, D) at M positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            PostNormBlock(config.text_dim, config.text_heads, config.dropout, context_dim=config.image_dim)
            for _ in range(config.fusion_depth))

    def keys_values(self, image: Tensor) -> list[Tensor]:
        """Each block's keys and values of the image tokens (B, S, D'), computed once and shared by every pass."""
        return [block.cross.keys_values(image) for block in self.blocks]

    def start(self, text: Tensor, keep: Tensor) -> Tensor:
        """What the first block does before it sees an image, (B, T, D), computed once for all images."""
        return self.blocks[0].attend_self(text, keep)

    def forward(self, started: Tensor, keep: Tensor, at: Tensor, keys_values: list[Tensor],
                image_keep: Tensor | None = None) -> Tensor:
        """Text tokens from `start` -> fused tokens (B, M, D): the last block computes the positions `at` alone."""
        x = pick(started, at) if len(self.blocks) == 1 else started
        x = self.blocks[0].attend_context(x, keys_values[0], image_keep)
        for block, context in zip(self.blocks[1:], keys_values[1:]):
            x = block.attend_self(x, keep, at if block is self.blocks[-1] else None)
            x = block.attend_context(x, context, image_keep)
        return x                                                             # (B, M, D)

    def fused_cls(self, started: Tensor, keep: Tensor, keys_values: list[Tensor], images: Tensor) -> Tensor:
        """Fused [CLS] (B, D) of texts from `start` with `images` (B,), ascending rows of the keys and values.

        Only self-attention tells texts apart. Elsewhere their L tokens, without padding, are one sequence, in which the
        texts of an image attend to its keys and values together: there is no copy for each text.
        """
        kept = keep.flatten().nonzero().squeeze(1)                                     # (L,) of the B * T tokens
        place = (keep.flatten().cumsum(0) - 1).view(keep.shape)                        # (B, T) in 0..L-1; padding: any
        count = len(keys_values[0])
        texts_of = images.bincount(minlength=count).tolist()                           # the number for each image
        tokens_of = images.repeat_interleave(keep.sum(1)).bincount(minlength=count).tolist()
        x, first = started, torch.zeros(len(started), 1, dtype=torch.long, device=started.device)
        for block, following, context in zip(self.blocks, self.blocks[1:], keys_values):
            x = block.attend_context(x.flatten(0, 1)[kept][None], context, counts=tokens_of)[0][place]
            x = following.attend_self(x, keep, first if following is self.blocks[-1] else None)
        return self.blocks[-1].attend_context(x[:, 0][None], keys_values[-1], counts=texts_of)[0]
