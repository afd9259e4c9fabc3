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
from torch.utils.data import Dataset

from mra.config import ModelConfig
from mra.data.augment import tensor_of
from mra.data.batches import loader
from mra.data.records import open_image
from mra.data.tokenizer import Tokenizer, pad
from mra.data.words import swap_left_right
from mra.retriever import Retriever
from mra.similarity import own_batches, sharded_top_k, summed, top_k

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
FIRST = 10       # images found for each query at least
BLOCK = 512      # queries whose similarity with the whole gallery is in memory at once
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)    # of the similarity beside the matching logit
GATHERED = 4 * 2**30     # bytes of keys and values that are matched at a time, at most


def metric_rows(order: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """METRICS of each query (Q', 5) from order (Q, G), the gallery's indices, best first; ids are (Q,) and (G,).

    A query without a match is left out. mINP: the mean of the number of matches / rank of the last (Ye et al. 2021).
    """
    hit = gallery_ids[order] == query_ids[:, None]                                 # (Q, G)
    hit = hit[hit.any(1)].double()
    found = hit.cumsum(1)                                                          # hits among the first r
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)                    # (G,)
    matches, last = found[:, -1], (hit * rank).amax(1)
    return torch.stack([*(found[:, min(k, len(rank)) - 1].clamp(max=1) for k in (1, 5, 10)),
                        (found / rank * hit).sum(1) / matches, matches / last], 1)


def means(rows: list[Tensor]) -> dict[str, float]:
    """METRICS in percent, from `metric_rows` of some queries after others; nan where none has a match."""
    return dict(zip(METRICS, (100 * torch.cat(rows).mean(0)).tolist()))


@dataclass(frozen=True)
class Search:
    """What two stages found. The whole Q x G matrix of similarities exists in blocks alone, and for the metrics alone.

    Similarity is the product of queries (Q, E') and gallery (G, E'), which may lie in a file. On the CPU: the K most
    similar images of each query, candidates (Q, K), best first, and their similarity (Q, K); the matching logits (Q, k)
    of the first k of them, [matched] - [mismatched], the mean of the passes; matched (passes, Q, k) is the first alone.
    """

    queries: Tensor
    gallery: Tensor
    similarity: Tensor
    candidates: Tensor
    logits: Tensor
    matched: Tensor

    def reranked(self, weight: float, published: bool = False) -> Tensor:
        """Gallery indices (Q, K): the first k by logit + weight * similarity, or as published; the others as found."""
        again, others = self.candidates.tensor_split([self.logits.shape[1]], 1)
        score = (self.published_scores(weight) if published
                 else self.logits + weight * self.similarity[:, :again.shape[1]])
        return torch.cat([again.gather(1, score.argsort(dim=1, descending=True, stable=True)), others], 1)

    def published_scores(self, weight: float) -> Tensor:
        """The released code's scores (Q, k) on one process: matching + weight * similarity, each min-max scaled.

        The extremes are those of all pairs of queries and images; matching is the mean of the passes, each scaled by
        itself. All other images share the query's lowest matching score there, and so stay behind, by similarity.
        On W processes the released code weighs the similarity about W times more: give W * 0.002.
        """
        lowest = -top_k(-self.queries, self.gallery, 1)[0].max().cpu()
        scaled = (self.similarity - lowest) / (self.similarity.max() - lowest).clamp(min=1e-12)
        least, most = self.matched.amin((1, 2), keepdim=True), self.matched.amax((1, 2), keepdim=True)
        matching = ((self.matched - least) / (most - least).clamp(min=1e-12)).mean(0)            # (Q, k)
        return matching + weight * scaled[:, :matching.shape[1]]

    def rest(self, some: slice) -> Tensor:
        """For some queries the images (q, G - K) that are not among the candidates, by similarity."""
        scores = self.queries[some] @ self.gallery.to(self.queries).T                  # (q, G)
        scores.scatter_(1, self.candidates[some].to(scores.device), -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return order[:, :scores.shape[1] - self.candidates.shape[1]].cpu()

    def metrics(self, query_ids: Tensor, gallery_ids: Tensor, *firsts: Tensor) -> list[dict[str, float]]:
        """METRICS in percent of each order of the candidates (Q, K), all other images behind; nan without any match."""
        parts = [[] for _ in firsts]
        for start in range(0, len(query_ids), BLOCK):
            some = slice(start, start + BLOCK)
            rest = self.rest(some)
            for part, first in zip(parts, firsts):
                part.append(metric_rows(torch.cat([first[some], rest], 1), query_ids[some], gallery_ids))
        return list(map(means, parts))


def choose_weight(found: Search, query_ids: Tensor, gallery_ids: Tensor) -> tuple[float, dict[str, float]]:
    """The similarity weight of WEIGHTS with the best `quality`, and its metrics; to be called on val only."""
    results = found.metrics(query_ids, gallery_ids, *map(found.reranked, WEIGHTS))
    return max(zip(WEIGHTS, results), key=lambda pair: quality(pair[1]))


def quality(metrics: dict[str, float]) -> float:
    """What weights and checkpoints are chosen by on val: the mean of R@1 and mAP, steadier than R@1 alone."""
    return (metrics["R@1"] + metrics["mAP"]) / 2


class Images(Dataset):
    """Image files as model input (3, H, W)."""

    def __init__(self, paths: list[str], config: ModelConfig):
        self.paths, self.size = paths, (config.height, config.width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return tensor_of(open_image(self.paths[index]), self.size)


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
def encode_gallery(model: Retriever, images: Dataset, batch: int, workers: int = 0, mirror: bool = True) -> Tensor:
    """Unit features (G, 2, E) of the images and of their mirror images, or without `mirror` (G, 1, E)."""
    device, own = next(model.parameters()).device, own_batches(len(images), batch)
    features = torch.zeros(len(images), 1 + mirror, model.config.embed, device=device)
    for start, image in zip(own[::batch], loader(images, workers, batch_size=batch, sampler=own)):
        image = image.to(device)
        for i, x in enumerate((image, image.flip(-1))[:1 + mirror]):
            features[start:start + batch, i] = model.encode_image(x)[1].float()
    return summed(features)


@torch.inference_mode()
def match_candidates(model: Retriever, images: Dataset, queries: Queries, candidates: Tensor, mirrored: bool,
                     batch: int, pairs: int = 0, workers: int = 0) -> Tensor:
    """Matching logits (Q, k, 2), [mismatched, matched], of each query with its candidates (Q, k).

    Image by image: a gallery image's keys and values are computed once for all queries that ask for it, so no
    tokens of the gallery are held in memory; an image that no query asks for is not read. What a query's words make of
    each other before they see an image is computed once, the last layer for [CLS] alone, and lengths that are alike
    stand side by side, rounded up so that few shapes occur. `pairs` are matched at a time; 0: what suits the device,
    and GATHERED.
    """
    device = candidates.device
    wanted, places = candidates.unique(return_inverse=True)                        # (G',), and (Q, k) places in it
    own = own_batches(len(wanted), batch)
    logits = torch.zeros(places.numel(), 2, device=device)
    lengths = queries.keep.sum(1)                                                  # (Q,)
    for start, image in zip(own[::batch], loader(images, workers, batch_size=batch, sampler=wanted[own].tolist())):
        asked = ((places >= start) & (places < start + batch)).flatten().nonzero().squeeze(1)    # pairs of this batch
        image = image.to(device)
        tokens = model.image_encoder(image.flip(-1) if mirrored else image)        # (b, 1+N, D)
        memories = model.fusion_encoder.memories(tokens)
        usual = 2048 if device.type == "cuda" else 256                             # 256 stay in a CPU's cache
        count = pairs or min(usual, GATHERED // sum(memory[0].nbytes for memory in memories))
        by_length = lengths[asked // places.shape[1]].argsort(stable=True)         # alike lengths side by side
        for some in asked[by_length].split(count):
            query, column = some // places.shape[1], places.flatten()[some] - start
            longest = -(-int(lengths[query].max()) // 8) * 8                       # beyond T, slicing stops there
            logits[some] = model.match(queries.tokens[query, :longest], queries.keep[query, :longest],
                                       [memory[column] for memory in memories], begun=True).float()
    return summed(logits).view(*places.shape, 2)


@torch.inference_mode()
def search(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], k: int,
           mirror: bool = True, batch: int = 64, workers: int = 0, swap: bool = True,
           features: Tensor | None = None) -> Search:
    """Rank the gallery `paths` for every caption: by similarity, and the first k (at most G, 0: none) by matching.

    Several processes share out the images; all must call this, and all get the same.
    `mirror` averages over the mirror images, whose captions get left and right exchanged unless `swap` is off.
    `features` (G, 2, E) are those of `encode_gallery`, where they are known; they may lie in a file, and stay there.
    """
    images = Images(paths, model.config)
    passes = [encode_queries(model, tokenizer, captions)]
    if features is None:
        features = encode_gallery(model, images, batch, workers, mirror)
    if mirror:
        passes.append(encode_queries(model, tokenizer, list(map(swap_left_right, captions))) if swap else passes[0])
    # one product of these is the mean of the passes' similarities
    queries = torch.cat([words.features for words in passes], 1) / len(passes)     # (Q, passes * E)
    gallery = features[:, :len(passes)].flatten(1)                                 # (G, passes * E)
    with torch.autocast(queries.device.type, enabled=False):
        values, candidates = sharded_top_k(queries, gallery, max(k, FIRST))             # (Q, K)
    pairs = torch.stack([match_candidates(model, images, words, candidates[:, :k], mirrored=bool(i), batch=batch,
                                          workers=workers) for i, words in enumerate(passes)]).cpu()
    logits = (pairs[..., 1] - pairs[..., 0]).mean(0)                               # (passes, Q, k, 2) -> (Q, k)
    return Search(queries, gallery, values.cpu(), candidates.cpu(), logits, pairs[..., 1])
