"""Two-stage search and its metrics: embeddings rank the gallery, the fusion encoder re-scores the first k.

MRA section 3, inference, with one departure: the score of a pair depends on that pair alone (matching logit +
weight x cosine similarity), where the paper normalises over the whole score matrix, so that a query's order
depends on which other queries are asked. `published_scores` is the released code's way. Both stages average over
the image and its mirror image; the words of the mirrored pass have left and right swapped (there they have not).
Before: retriever.py. After: checkpoint.py, training.py; evaluate.py is the script.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mra.config import ModelConfig
from mra.data.augment import plain_view
from mra.data.records import open_image
from mra.data.tokenizer import Tokenizer, pad
from mra.data.words import swap_left_right
from mra.retriever import Retriever
from mra.similarity import own_batches, summed

WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)    # of the similarity beside the matching logit


def retrieval_metrics(scores: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10, mAP and mINP in percent from scores (Q, G), the highest first; equal scores keep their order.

    query_ids (Q,), gallery_ids (G,). A query without a match in the gallery is left out of every mean; nan
    where no query has one. mINP = number of matches / rank of the last one (Ye et al. 2021).
    """
    return order_metrics(scores.argsort(dim=1, descending=True, stable=True), query_ids, gallery_ids)


def order_metrics(order: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> dict[str, float]:
    """The metrics of `retrieval_metrics` from order (Q, G): for each query the gallery's indices, best first."""
    rows = []
    for ids, ranked in zip(query_ids.split(512), order.split(512)):                # bounded memory for large Q x G
        hit = gallery_ids[ranked] == ids[:, None]                                  # (q, G)
        hit = hit[hit.any(1)].double()
        found = hit.cumsum(1)                                                      # hits among the first r
        rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)                # (G,)
        matches = found[:, -1]
        last = (hit * rank).amax(1) if len(hit) else matches
        rows.append(torch.stack([*(found[:, min(k, len(rank)) - 1].clamp(max=1) for k in (1, 5, 10)),
                                 (found / rank * hit).sum(1) / matches, matches / last], 1))
    means = 100 * torch.cat(rows).mean(0)
    return dict(zip(("R@1", "R@5", "R@10", "mAP", "mINP"), means.tolist()))


@dataclass(frozen=True)
class Search:
    """What two stages found, on the CPU: cosine similarity (Q, G), candidates (Q, k) and their matching logits.

    logits (Q, k) are [matched] - [mismatched], the mean of the passes; matched (passes, Q, k) is the first alone.
    """

    similarity: Tensor
    candidates: Tensor
    logits: Tensor
    matched: Tensor

    def first_order(self) -> Tensor:
        """Gallery indices (Q, G) by similarity alone."""
        return self.similarity.argsort(dim=1, descending=True, stable=True)

    def order(self, weight: float) -> Tensor:
        """Gallery indices (Q, G): candidates by logit + weight * similarity, then the others by similarity."""
        score = self.logits + weight * self.similarity.gather(1, self.candidates)
        best = self.candidates.gather(1, score.argsort(dim=1, descending=True, stable=True))
        return torch.cat([best, self.first_order()[:, best.shape[1]:]], 1)

    def published_scores(self, weight: float = 0.002) -> Tensor:
        """The released code's scores (Q, G) on one process: matching + weight * similarity, min-max over the matrix.

        Matching is the mean of the passes, each normalised by itself; the rest of the gallery gets the query's
        lowest. On W processes the released code weighs the similarity about W times more: give W * 0.002.
        """
        matching = torch.zeros_like(self.similarity)
        for logits in self.matched:                                                # (Q, k)
            lowest = logits.amin(1, keepdim=True).expand(self.similarity.shape)
            matching += _min_max(lowest.scatter(1, self.candidates, logits)) / len(self.matched)
        return matching + weight * _min_max(self.similarity)


def _min_max(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)


def choose_weight(search: Search, query_ids: Tensor, gallery_ids: Tensor) -> float:
    """The similarity weight of WEIGHTS with the best `quality`; to be called on val only."""
    return max(WEIGHTS, key=lambda weight: quality(order_metrics(search.order(weight), query_ids, gallery_ids)))


def quality(metrics: dict[str, float]) -> float:
    """What weights and checkpoints are chosen by on val: the mean of R@1 and mAP, steadier than R@1 alone."""
    return (metrics["R@1"] + metrics["mAP"]) / 2


class Images(torch.utils.data.Dataset):
    """Image files as model input (3, H, W)."""

    def __init__(self, paths: list[str], config: ModelConfig):
        self.paths, self.size = paths, (config.height, config.width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return plain_view(open_image(self.paths[index]), self.size)


@dataclass(frozen=True)
class Queries:
    """Queries, encoded: tokens (Q, T, D) as the fusion encoder has begun them, keep (Q, T), unit features (Q, E)."""

    tokens: Tensor
    keep: Tensor
    features: Tensor


@torch.inference_mode()
def encode_queries(model: Retriever, tokenizer: Tokenizer, captions: list[str], batch: int = 256) -> Queries:
    """Encode sentences with the text encoder; they are padded to the longest of all."""
    device = next(model.parameters()).device
    ids, keep = pad([tokenizer.encode(caption, model.config.max_tokens) for caption in captions], tokenizer.pad_id)
    keep, begun, features = keep.to(device), [], []
    for some, own in zip(ids.to(device).split(batch), keep.split(batch)):
        tokens, feature = model.encode_text(some, own)
        begun.append(model.fusion_encoder.begin(tokens, own))
        features.append(feature.float())
    return Queries(torch.cat(begun), keep, torch.cat(features))


@torch.inference_mode()
def encode_gallery(model: Retriever, images: torch.utils.data.Dataset, batch: int,
                   workers: int = 0) -> Tensor:
    """Unit features (2, G, E) of the images and of their mirror images."""
    device, own = next(model.parameters()).device, own_batches(len(images), batch)
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(images, own), batch, num_workers=workers)
    features = torch.zeros(2, len(images), model.config.embed, device=device)
    for start, image in zip(own[::batch], loader):
        for mirrored in (False, True):
            x = image.to(device)
            features[int(mirrored), start:start + batch] = model.encode_image(x.flip(-1) if mirrored else x)[1].float()
    return summed(features)


@torch.inference_mode()
def match_candidates(model: Retriever, images: torch.utils.data.Dataset, queries: Queries, candidates: Tensor,
                     mirrored: bool, batch: int, pairs: int = 0, workers: int = 0) -> Tensor:
    """Matching logits (Q, k, 2), [mismatched, matched], of each query with its candidates (Q, k).

    Image by image: a gallery image's keys and values are computed once for all queries that ask for it, so no
    tokens of the gallery are held in memory; an image that no query asks for is not read. What a query's words make of
    each other before they see an image is computed once, the last layer for [CLS] alone, and lengths that are alike
    stand side by side, rounded up so that few shapes occur. `pairs` are matched at a time; 0: what suits the device.
    """
    device = candidates.device
    pairs = pairs or (4096 if device.type == "cuda" else 256)                      # 256 stay in a CPU's cache
    wanted, candidates = candidates.unique(return_inverse=True)                    # now places in wanted (G',)
    own = own_batches(len(wanted), batch)
    images = torch.utils.data.Subset(images, wanted[own].tolist())
    logits = torch.zeros(candidates.numel(), 2, device=device)
    lengths = queries.keep.sum(1)                                                  # (Q,)
    loader = torch.utils.data.DataLoader(images, batch, num_workers=workers)
    for start, image in zip(own[::batch], loader):
        place = ((candidates >= start) & (candidates < start + batch)).flatten().nonzero().squeeze(1)
        image = image.to(device)
        tokens = model.image_encoder(image.flip(-1) if mirrored else image)        # (b, 1+N, D)
        memories = model.fusion_encoder.memories(tokens)
        query = place // candidates.shape[1]                                       # (pairs of this batch,)
        by_length = lengths[query].argsort(stable=True)                            # alike lengths side by side
        for some in place[by_length].split(pairs):
            query = some // candidates.shape[1]
            column = candidates.flatten()[some] - start
            longest = -(-int(lengths[query].max()) // 8) * 8                       # beyond T, slicing stops there
            logits[some] = model.match(queries.tokens[query, :longest], queries.keep[query, :longest],
                                       [memory[column] for memory in memories], begun=True).float()
    return summed(logits).view(*candidates.shape, 2)


@torch.inference_mode()
def search(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], k: int,
           mirror: bool = True, batch: int = 64, workers: int = 0, swap: bool = True,
           features: Tensor | None = None) -> Search:
    """Rank the gallery `paths` for every caption: by similarity, and the first k (at most G, 0: none) by matching.

    Several processes share out the images; all must call this, and all get the same.

    `mirror` averages over the mirror images, whose captions get left and right exchanged unless `swap` is off.
    `features` (2, G, E) are those of `encode_gallery`, where they are known.
    """
    images = Images(paths, model.config)
    passes = [encode_queries(model, tokenizer, captions)]
    if features is None:
        features = encode_gallery(model, images, batch, workers)
    if mirror:
        passes.append(encode_queries(model, tokenizer, list(map(swap_left_right, captions))) if swap else passes[0])
    with torch.autocast(features.device.type, enabled=False):
        similarity = sum(words.features @ gallery.T for words, gallery in zip(passes, features)) / len(passes)  # (Q, G)
    candidates = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]    # (Q, k)
    if k == 0:
        none = similarity[:, :0].cpu()
        return Search(similarity.float().cpu(), candidates.cpu(), none, none[None])
    pairs = torch.stack([match_candidates(model, images, words, candidates, mirrored=bool(i), batch=batch,
                                          workers=workers) for i, words in enumerate(passes)]).cpu()
    logits = (pairs[..., 1] - pairs[..., 0]).mean(0)                               # (passes, Q, k, 2) -> (Q, k)
    return Search(similarity.float().cpu(), candidates.cpu(), logits, pairs[..., 1])
