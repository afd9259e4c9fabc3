"""MRA, multi-granularity relation alignment (section 3): encoders, heads, and the loss terms of one batch.

`Retriever.forward` goes through the parts of the paper's figure. Images with captions, and regions with phrases, go
through the same `align`. A region keeps the tokens of its image, but token 0 becomes the mean of the patches that its
box touches, and the other patches are masked. RPC compares that mean with the phrase. Read next: ranking.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mra import losses
from mra.config import ModelConfig
from mra.data.batches import Batch
from mra.encoders import FusionEncoder, ImageEncoder, TextEncoder
from mra.group import Group
from mra.layers import initialise


@dataclass(frozen=True)
class Objective:
    """The loss terms of a step, and the group (group.py) over whose batch they are computed."""
    fuse: bool = True           # whether ITM and MLM are computed; RPM always is: phrases are short
    smoothing: float = 0.0      # of the contrastive targets
    eda: float = 0.0            # weight of the augmented caption's ITC and ITM
    contrastive: Callable[..., Tensor] = losses.contrastive            # run/contrastive.py: of all members' pairs
    group: Group = Group()      # who shares the batch


class Seen(NamedTuple):
    """Encoded images for their captions, or regions for their phrases."""
    feature: Tensor                     # (B, E) of unit length
    keys_values: list[Tensor] | None    # of each fusion block; None: nothing is fused
    keep: Tensor | None = None          # (B, S), True = a token that may be attended to; None: all


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
    """Image and text encoders with a shared contrastive space, and a fusion encoder that scores pairs."""

    new_parts = "image_projection", "text_projection", "matching_head", "word_head"     # at --lr x --head-lr

    def __init__(self, config: ModelConfig, image_encoder: nn.Module | None = None,
                 text_encoder: nn.Module | None = None):
        super().__init__()
        self.config, dim = config, config.text_dim
        self.image_encoder = image_encoder or ImageEncoder(config)
        self.text_encoder = text_encoder or TextEncoder(config)
        self.fusion_encoder = FusionEncoder(config)
        self.image_projection = nn.Linear(config.image_dim, config.embed, bias=not config.clip)
        self.text_projection = nn.Linear(dim, config.embed, bias=not config.clip)
        self.temperature = nn.Parameter(torch.tensor(0.07))
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

    def image_feature(self, tokens: Tensor) -> Tensor:
        """Unit features (B, E) of tokens (B, 1+N, D): the projection of token 0."""
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Word pieces (B, T) -> tokens (B, T, D) and unit features (B, E): the projection of [CLS]."""
        tokens = self.text_encoder(ids, keep)
        return tokens, F.normalize(self.text_projection(tokens[:, 0]), dim=-1)

    def encode_region(self, tokens: Tensor, region_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens (B, 1+N, D), patches of a box (B, N) -> region tokens (B, 1+N, D), keep (B, 1+N), (B, E)."""
        region, keep = pool_region(tokens, region_keep)
        return region, keep, self.image_feature(region)

    def match(self, started: Tensor, keep: Tensor, keys_values: list[Tensor],
              image_keep: Tensor | None = None) -> Tensor:
        """Matching logits (B, 2) of texts from `fusion_encoder.start` (B, T, D) with the keys and values of images."""
        first = torch.zeros(len(started), 1, dtype=torch.long, device=started.device)    # position of [CLS]
        return self.matching_logits(self.fusion_encoder(started, keep, first, keys_values, image_keep)[:, 0])

    def matching_logits(self, fused: Tensor) -> Tensor:
        """Matching logits (B, 2), mismatched and matched, of fused [CLS] (B, D)."""
        with torch.autocast(fused.device.type, enabled=False):      # bf16 would round the scores that rank candidates
            return self.matching_head(fused.float())

    def forward(self, batch: Batch, objective: Objective = Objective()) -> dict[str, Tensor]:
        """The loss terms of one batch by name: itc; with `fuse` itm and mlm; with regions rpc and rpm."""
        tokens, feature = self.encode_image(batch.image)                                 # (B, 1+N, D), (B, E)
        seen = Seen(feature, self.fusion_encoder.keys_values(tokens) if objective.fuse else None)
        terms = self.align(seen, batch.caption_ids, batch.caption_keep, batch.identity, objective)
        if batch.eda_ids is not None:
            again = self.align(seen, batch.eda_ids, batch.eda_keep, batch.identity, objective)
            terms = {name: term + objective.eda * again[name] for name, term in terms.items()}
        if objective.fuse:
            terms["mlm"] = self.predict_words(batch, seen, objective)
        if batch.region_keep is not None:
            region, keep, feature = self.encode_region(tokens, batch.region_keep)
            seen = Seen(feature, self.fusion_encoder.keys_values(region), keep)
            aligned = self.align(seen, batch.phrase_ids, batch.phrase_keep, batch.phrase_class, objective)
            terms |= {"rpc": aligned["itc"], "rpm": aligned["itm"]}
        return terms

    def align(self, seen: Seen, ids: Tensor, keep: Tensor, classes: Tensor, objective: Objective) -> dict[str, Tensor]:
        """Contrastive and, where images can be fused, matching loss of images and captions, or regions and phrases.

        ids, keep (B, T); classes (B,): pairs of one class, an identity or a phrase, are positives.
        """
        text, feature = self.encode_text(ids, keep)                                      # (B, T, D), (B, E)
        terms = {"itc": objective.contrastive(seen.feature, feature, self.temperature, classes, objective.smoothing)}
        if seen.keys_values is not None:
            logits = losses.similarity_logits(seen.feature, feature, self.temperature).detach()     # (B, B)
            scores, matched, exists = self.match_with_negatives(logits, seen, text, keep, classes)
            terms["itm"] = objective.group.mean_where(losses.matching(scores, matched), exists)
        return terms

    def match_with_negatives(self, logits: Tensor, seen: Seen, text: Tensor, keep: Tensor,
                             classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (3B, 2) of ITM or RPM: B matched pairs, B images with a wrong text, B texts with a wrong image.

        The contrastive logits (B, B) draw each negative from another class, another person or phrase, among this
        member's own B pairs. Also returns which pairs match and which exist (3B,): all B may be of one class.
        """
        wrong_text, text_exists = losses.hard_negatives(logits, classes)                    # (B,), (B,)
        wrong_image, image_exists = losses.hard_negatives(logits.T, classes)
        rows, yes = torch.arange(len(text), device=text.device), torch.ones_like(text_exists)
        images, texts = torch.cat([rows, rows, wrong_image]), torch.cat([rows, wrong_text, rows])     # (3B,)
        matched, exists = torch.cat([yes, ~yes, ~yes]), torch.cat([yes, text_exists, image_exists])   # (3B,)
        # `start` is computed once for each text; index_select, unlike indexing, adds gradients in a fixed order
        started = self.fusion_encoder.start(text, keep).index_select(0, texts)                        # (3B, T, D)
        keys_values = [one.index_select(0, images) for one in seen.keys_values]
        image_keep = None if seen.keep is None else seen.keep[images]
        return self.match(started, keep[texts], keys_values, image_keep), matched, exists

    def predict_words(self, batch: Batch, seen: Seen, objective: Objective) -> Tensor:
        """Masked-word loss: the masked caption, fused with its image, predicts its masked words."""
        text, keep = self.text_encoder(batch.masked_ids, batch.caption_keep), batch.caption_keep     # (B, T, D), (B, T)
        started = self.fusion_encoder.start(text, keep)                                              # (B, T, D)
        fused = self.fusion_encoder(started, keep, batch.masked_at, seen.keys_values)                # (B, M, D)
        logits = self.word_head(fused)                                                               # (B, M, V)
        loss = losses.masked_words(logits, batch.masked_labels)                                      # (B, M)
        return objective.group.mean_where(loss, batch.masked_labels >= 0)

    @torch.no_grad()
    def limit_temperature(self) -> None:
        """Keep the learned temperature within 0.001 and 0.5; called after every step."""
        self.temperature.clamp_(0.001, 0.5)


def pool_region(tokens: Tensor, region_keep: Tensor) -> tuple[Tensor, Tensor]:
    """Image tokens (B, 1+N, D) and the patches of a box (B, N) -> region tokens (B, 1+N, D) and their keep (B, 1+N).

    Token 0 becomes the mean of the region's patches (MRA section 3); 0 if there are none.
    """
    patches, weights = tokens[:, 1:], region_keep[:, None].to(tokens.dtype)              # (B, N, D), (B, 1, N)
    mean = (weights / weights.sum(2, keepdim=True).clamp(min=1)) @ patches               # (B, 1, D)
    return torch.cat([mean, patches], 1), F.pad(region_keep, (1, 0), value=True)
