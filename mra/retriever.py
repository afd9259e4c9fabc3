"""MRA, multi-granularity relation alignment (section 3): encoders, heads, and the loss terms of one batch.

`forward` names the stages of the paper's figure. Whole images with captions and regions with phrases go
through the same `align`: a region is the mean of the tokens whose patches its box touches, followed by those
tokens. That mean is what the region-phrase contrastive loss compares (with `bins` these tokens bin by bin, the mean in
place of the others), and the fusion encoder sees it too (in the released code it does neither).
Before: losses.py, similarity.py, data/batches.py. After: training.py, ranking.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra import losses, similarity
from mra.config import ModelConfig
from mra.data.batches import Batch
from mra.encoders import FusionEncoder, ImageEncoder, SwinEncoder, TextEncoder
from mra.layers import initialise


class WordHead(nn.Module):
    """Fused tokens (..., D) -> scores of every word piece (..., V); the decoder is the word embedding itself."""

    def __init__(self, dim: int, words: nn.Embedding):
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, 1e-12))
        self.decoder = nn.Linear(dim, words.num_embeddings)
        self.decoder.weight = words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class Retriever(nn.Module):
    """Image and text encoders with a shared contrastive space, and a fusion encoder that judges pairs."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.image_encoder = SwinEncoder(config) if config.window else ImageEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.fusion_encoder = FusionEncoder(config)
        self.image_projection = projection(config.image_dim, config.bins, config)
        self.text_projection = projection(config.text_dim, config.bins and 1 + config.bins, config)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        dim = config.text_dim
        self.matching_head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(),
                                           nn.Linear(2 * dim, 2))
        self.word_head = WordHead(dim, self.text_encoder.words)
        self.apply(initialise)
        for name, parameter in self.image_encoder.named_parameters():
            if "position" in name or name == "class_token":
                nn.init.trunc_normal_(parameter, std=0.02)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, 3, H, W) -> tokens (B, 1+N, D) and unit features (B, E)."""
        tokens = self.image_encoder(image)
        return tokens, self.image_feature(tokens)

    def image_feature(self, tokens: Tensor, region_keep: Tensor | None = None) -> Tensor:
        """Unit features (B, E) of the tokens (B, 1+N, D) of images, or of regions and the patches they touch (B, N)."""
        x, patches = tokens[:, 0], tokens[:, 1:]
        if self.config.bins:
            if region_keep is not None:
                patches = torch.where(region_keep[..., None], patches, x[:, None])   # none outside reaches a bin
            x = binned(patches, self.config.bins)
        return F.normalize(self.image_projection(x), dim=-1)

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Word pieces (B, T) -> tokens (B, T, D) and unit features (B, E).

        With `bins` the features are of [CLS] and the bins of all up to max_tokens, padding (id 0) too, as released.
        """
        length = ids.shape[1]
        fill = (0, self.config.max_tokens - length) if self.config.bins else (0, 0)
        tokens = self.text_encoder(F.pad(ids, fill), F.pad(keep, fill))      # (B, max_tokens or T, D)
        x = tokens[:, 0]
        if self.config.bins:
            x = torch.cat([x, binned(tokens[:, 1:], self.config.bins)], 1)   # (B, (1 + bins) D)
        return tokens[:, :length], F.normalize(self.text_projection(x), dim=-1)

    def match(self, text: Tensor, keep: Tensor, memories: list[Tensor], image_keep: Tensor | None = None,
              begun: bool = False) -> Tensor:
        """Matching logits (B, 2) of text tokens (B, T, D), or what `begin` made of them, with image memories."""
        first = torch.zeros(len(text), 1, dtype=torch.long, device=text.device)          # [CLS] alone
        fused = self.fusion_encoder(text, keep, first, memories, image_keep, begun=begun)[:, 0]       # (B, D)
        with torch.autocast(fused.device.type, enabled=False):      # bf16 would round what candidates are ordered by
            return self.matching_head(fused.float())

    def forward(self, batch: Batch, fuse: bool = True, smoothing: float = 0.0, eda: float = 0.0) -> dict[str, Tensor]:
        """The loss terms of one batch by name: itc; with `fuse` itm and mlm; with regions rpc and rpm.

        RPM does not wait for `fuse`: phrases are short, so it is cheap, and it prepares the fusion encoder.
        """
        image, feature = self.encode_image(batch.image)                      # (B, 1+N, D), (B, E)
        memories = self.fusion_encoder.memories(image) if fuse else None
        terms = self.align(feature, memories, None, batch.caption_ids, batch.caption_keep, batch.identity, smoothing)
        if batch.eda_ids is not None:
            again = self.align(feature, memories, None, batch.eda_ids, batch.eda_keep, batch.identity, smoothing)
            terms = {name: term + eda * again[name] for name, term in terms.items()}
        if fuse:
            terms["mlm"] = self.predict_words(batch, memories)
        if batch.region_keep is not None:
            released = self.config.released_regions                          # then the feature ignores the box
            region, region_keep = pool_region(image, batch.region_keep, keep_mean=not released)
            feature = self.image_feature(image) if released else self.image_feature(region, batch.region_keep)
            aligned = self.align(feature, self.fusion_encoder.memories(region), region_keep, batch.phrase_ids,
                                 batch.phrase_keep, batch.phrase_class, smoothing)
            terms |= {"rpc": aligned["itc"], "rpm": aligned["itm"]}
        return terms

    def align(self, feature: Tensor, memories: list[Tensor] | None, image_keep: Tensor | None, ids: Tensor,
              keep: Tensor, classes: Tensor, smoothing: float) -> dict[str, Tensor]:
        """Contrastive and, given memories, matching loss of images with captions, or of regions with phrases."""
        text, text_feature = self.encode_text(ids, keep)                     # (B, T, D), (B, E)
        terms = {"itc": similarity.contrastive(feature, text_feature, self.temperature, classes, smoothing)}
        if memories is not None:
            scores = (feature @ text_feature.T).detach() / self.temperature.detach()     # (B, B)
            terms["itm"] = self.matching_loss(scores, memories, image_keep, text, keep, classes)
        return terms

    def matching_loss(self, scores: Tensor, memories: list[Tensor], image_keep: Tensor | None, text: Tensor,
                      keep: Tensor, classes: Tensor) -> Tensor:
        """Matching loss of B matched pairs, B images with a wrong text and B texts with a wrong image."""
        wrong_text, text_exists = losses.hard_negatives(scores, classes)             # (B,), (B,)
        wrong_image, image_exists = losses.hard_negatives(scores.T, classes)
        own, yes = torch.arange(len(text), device=text.device), torch.ones_like(text_exists)
        images, texts = torch.cat([own, own, wrong_image]), torch.cat([own, wrong_text, own])      # (3B,)
        matched, counts = torch.cat([yes, ~yes, ~yes]), torch.cat([yes, text_exists, image_exists])
        logits = self.match(text.index_select(0, texts), keep[texts],      # text[texts] sums gradients in any order
                            [memory.index_select(0, images) for memory in memories],
                            None if image_keep is None else image_keep[images])          # (3B, 2)
        return mean_over_processes(losses.matching(logits, matched), counts)

    def predict_words(self, batch: Batch, memories: list[Tensor]) -> Tensor:
        """Masked-word loss: the masked caption, fused with its image, names its masked words."""
        text = self.text_encoder(batch.masked_ids, batch.caption_keep)                   # (B, T, D)
        fused = self.fusion_encoder(text, batch.caption_keep, batch.masked_at, memories)     # (B, M, D)
        logits = self.word_head(fused)                                                   # (B, M, V)
        return mean_over_processes(losses.masked_words(logits, batch.masked_labels), batch.masked_labels >= 0)


def projection(dim: int, parts: int, config: ModelConfig) -> nn.Module:
    """Token 0 (B, D), or the concatenation of so many parts (B, parts * D), -> the contrastive space (B, E)."""
    if not parts:
        return nn.Linear(dim, config.embed)
    return nn.Sequential(nn.BatchNorm1d(parts * dim), nn.Dropout(config.dropout), nn.Linear(parts * dim, config.embed))


def binned(tokens: Tensor, bins: int) -> Tensor:
    """Tokens (B, N, D) -> the means of `bins` equal stretches, one after another (B, bins * D)."""
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), bins).transpose(1, 2).flatten(1)


def pool_region(image: Tensor, region_keep: Tensor, keep_mean: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens (B, 1+N, D) and the patches of a box (B, N) -> region tokens (B, 1+N, D) and their keep (B, 1+N).

    Token 0 becomes the mean of the region's patches and is kept (MRA section 3), or not, as in the released code.
    """
    mean = similarity.pool_regions(image[:, 1:], region_keep[:, None])                   # (B, 1, D)
    keep = F.pad(region_keep, (1, 0), value=keep_mean)                                   # (B, 1+N)
    return torch.cat([mean, image[:, 1:]], 1), keep


def mean_over_processes(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of the values where counts is True, such that averaging it over processes gives the joint mean."""
    count = similarity.summed(counts.sum().float())
    return (values * counts).sum() * similarity.processes() / count.clamp(min=1)
