"""Two-stage search and its metrics: embeddings rank the gallery, the fusion encoder re-scores the first k.

A candidate's score is match + weight * similarity. Match is the fusion encoder's logit [matched] - [mismatched],
similarity the cosine of the embeddings. The weight says how much the similarity counts: with 0 the match alone orders
the candidates, with a large weight they keep the first stage's order. `choose_weight` takes the best one on val, and
the checkpoint keeps it. A score depends on its pair alone; in MRA section 3, and in `Found.published_scores`, scores
are normalised over all pairs, so a query's order depends on the other queries. With `Plan.mirror` both stages average
over an image and its mirror image, with left and right exchanged in the words, as the released code does not.
Read next: workers.py, evaluate.py.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mra.config import ModelConfig
from mra.data.augment import tensor_of
from mra.data.batches import loader
from mra.data.files import open_image
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer, pad
from mra.data.words import clean, swap_left_right
from mra.retriever import Retriever
from mra.workers import Workers

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
FIRST = 10                          # images found for each query at least
BLOCK = 512                         # queries whose similarities with the whole gallery are in memory at once
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)    # of the similarity, to choose from
PAIRS = {"cuda": 2048, "cpu": 256}  # pairs matched at a time; 256 stay in a CPU's cache
GATHERED = 4 * 2**30                # bytes of their keys and values, at most


# ---- metrics

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
    """METRICS in percent, from `metric_rows` of several blocks of queries; nan where no query has a match."""
    return dict(zip(METRICS, (100 * torch.cat(rows).mean(0)).tolist()))


def retrieval_metrics(scores: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> dict[str, float]:
    """METRICS in percent of a matrix of scores (Q, G), higher is better; ids are (Q,) and (G,)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return means([metric_rows(order, query_ids, gallery_ids)])


@dataclass(frozen=True)
class Found:
    """What the two stages found for Q queries in G images: K candidates of each, the first k of them re-scored."""

    queries: Tensor         # (Q, E') unit features of all passes
    gallery: Tensor         # (G, E') may lie in a file
    similarity: Tensor      # (Q, K) of the candidates; this and what follows is on the CPU
    candidates: Tensor      # (Q, K) indices of the most similar images, best first
    match: Tensor           # (Q, k) logit [matched] - [mismatched], the mean of the passes
    matched: Tensor         # (passes, Q, k) the logit [matched] alone

    def reranked(self, weight: float, published: bool = False) -> Tensor:
        """Gallery indices (Q, K): the first k by match + weight * similarity, or as published; the others as found."""
        k = self.match.shape[1]
        score = self.published_scores(weight) if published else self.match + weight * self.similarity[:, :k]
        order = score.argsort(dim=1, descending=True, stable=True)
        return torch.cat([self.candidates[:, :k].gather(1, order), self.candidates[:, k:]], 1)

    def published_scores(self, weight: float) -> Tensor:
        """The released code's scores (Q, k): logit [matched] + weight * similarity, each min-max scaled.

        Similarity is scaled over all pairs, the logit over the candidates of each pass. There too the other images
        stay behind. On n processes the released code weighs the similarity about n times more: give n * 0.002.
        """
        lowest = min((some @ self.gallery.to(some).T).min().item() for some in self.queries.split(BLOCK))
        scaled = (self.similarity - lowest) / (self.similarity.max() - lowest).clamp(min=1e-12)
        least, most = self.matched.amin((1, 2), keepdim=True), self.matched.amax((1, 2), keepdim=True)
        matching = ((self.matched - least) / (most - least).clamp(min=1e-12)).mean(0)            # (Q, k)
        return matching + weight * scaled[:, :matching.shape[1]]

    def rest(self, some: Tensor) -> Tensor:
        """For some queries, by their indices (q,), the images (q, G - K) beyond the candidates, by similarity."""
        scores = self.queries[some] @ self.gallery.to(self.queries).T                            # (q, G)
        scores.scatter_(1, self.candidates[some].to(scores.device), -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return order[:, :scores.shape[1] - self.candidates.shape[1]].cpu()

    def metrics(self, query_ids: Tensor, gallery_ids: Tensor, *firsts: Tensor) -> list[dict[str, float]]:
        """METRICS in percent of each order of the candidates (Q, K), all other images behind; nan without any match."""
        rows = [[] for _ in firsts]
        for some in torch.arange(len(query_ids)).split(BLOCK):
            rest = self.rest(some)
            for own, first in zip(rows, firsts):
                own.append(metric_rows(torch.cat([first[some], rest], 1), query_ids[some], gallery_ids))
        return list(map(means, rows))


def choose_weight(found: Found, query_ids: Tensor, gallery_ids: Tensor) -> tuple[float, dict[str, float]]:
    """The weight among WEIGHTS with the best `quality`, and its metrics; for val alone."""
    results = found.metrics(query_ids, gallery_ids, *map(found.reranked, WEIGHTS))
    return max(zip(WEIGHTS, results), key=lambda pair: quality(pair[1]))


def quality(metrics: dict[str, float]) -> float:
    """What weights and checkpoints are chosen by, on val: the mean of R@1 and mAP varies less than R@1 alone."""
    return (metrics["R@1"] + metrics["mAP"]) / 2


# ---- search

def top_k(queries: Tensor, gallery: Tensor, k: int, workers: Workers = Workers()) -> tuple[Tensor, Tensor]:
    """The k best of gallery (G, E) for each query (Q, E), equal ones by index: similarities and indices (Q, k)."""
    values, indices = (queries @ gallery.to(queries).T).sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


@dataclass(frozen=True)
class Plan:
    """How to search. Several workers share out the images: all must search, and all get the same result."""

    k: int                          # candidates that the fusion encoder re-scores, at most G; 0: none
    mirror: bool = True             # average over the mirror images
    swap: bool = True               # exchange left and right in their captions
    batch: int = 64                 # images encoded at a time
    loading: int = 0                # image decoding processes
    workers: Workers = Workers()
    nearest: Callable[[Tensor, Tensor, int, Workers], tuple[Tensor, Tensor]] = top_k


class Images(Dataset):
    """Image files as model input (3, H, W)."""

    def __init__(self, paths: list[str], config: ModelConfig):
        self.paths, self.size = paths, (config.height, config.width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return tensor_of(open_image(self.paths[index]), self.size)


@torch.inference_mode()
def encode_queries(model: Retriever, tokenizer: Tokenizer, captions: list[str],
                   batch: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences' tokens (Q, T, D), started by the fusion encoder, keep (Q, T), and unit features (Q, E)."""
    device = next(model.parameters()).device
    pieces = [tokenizer.encode(caption, model.config.max_tokens) for caption in captions]
    ids, keep = (x.to(device) for x in pad(pieces, tokenizer.pad_id))              # (Q, T), (Q, T)
    started, features = [], []
    for own_ids, own_keep in zip(ids.split(batch), keep.split(batch)):
        tokens, feature = model.encode_text(own_ids, own_keep)
        started.append(model.fusion_encoder.start(tokens, own_keep))
        features.append(feature.float())
    return torch.cat(started), keep, torch.cat(features)


@torch.inference_mode()
def encode_gallery(model: Retriever, images: Dataset, plan: Plan) -> Tensor:
    """Unit features (G, 2, E) of the images and of their mirror images, or without mirror images (G, 1, E)."""
    device, own = next(model.parameters()).device, plan.workers.own_batches(len(images), plan.batch)
    features = torch.zeros(len(images), 1 + plan.mirror, model.config.embed, device=device)
    for start, image in zip(own[::plan.batch], loader(images, plan.loading, batch_size=plan.batch, sampler=own)):
        image = image.to(device)
        for i, x in enumerate((image, image.flip(-1))[:1 + plan.mirror]):
            features[start:start + plan.batch, i] = model.encode_image(x)[1].float()
    return plan.workers.summed(features)


@torch.inference_mode()
def match_candidates(model: Retriever, images: Dataset, queries: tuple[Tensor, ...], candidates: Tensor,
                     mirrored: bool, plan: Plan) -> Tensor:
    """Matching logits (Q, k, 2), [mismatched, matched], of each query with its candidates (Q, k).

    Keys and values of an image are computed once for all queries that ask for it, and then forgotten. An image that no
    query asks for is not read. Queries of like length are matched together, padded to a multiple of 8: few shapes.
    """
    text, keep, _ = queries                                                        # (Q, T, D), (Q, T)
    device = candidates.device
    wanted, places = candidates.unique(return_inverse=True)                        # (G',), and (Q, k) places in it
    own = plan.workers.own_batches(len(wanted), plan.batch)
    logits = torch.zeros(places.numel(), 2, device=device)
    lengths = keep.sum(1)                                                          # (Q,)
    batches = loader(images, plan.loading, batch_size=plan.batch, sampler=wanted[own].tolist())
    for start, image in zip(own[::plan.batch], batches):
        asked = ((places >= start) & (places < start + plan.batch)).flatten().nonzero().squeeze(1)   # pairs of it
        image = image.to(device)
        tokens = model.image_encoder(image.flip(-1) if mirrored else image)        # (b, 1+N, D)
        keys_values = model.fusion_encoder.keys_values(tokens)
        fitting = GATHERED // sum(one[0].nbytes for one in keys_values)
        by_length = lengths[asked // places.shape[1]].argsort(stable=True)
        for some in asked[by_length].split(max(1, min(PAIRS[device.type], fitting))):
            query, column = some // places.shape[1], places.flatten()[some] - start
            longest = 8 * math.ceil(int(lengths[query].max()) / 8)                 # slicing stops at T
            logits[some] = model.match(text[query, :longest], keep[query, :longest],
                                       [one[column] for one in keys_values]).float()
    return plan.workers.summed(logits).view(*places.shape, 2)


@torch.inference_mode()
def search(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], plan: Plan,
           features: Tensor | None = None) -> Found:
    """Rank the gallery `paths` for every caption: by similarity, and the first k by matching.

    `features` (G, 2, E) are those of `encode_gallery`, where they are known; they may lie in a file, and stay there.
    """
    images, passes = Images(paths, model.config), [encode_queries(model, tokenizer, captions)]
    if plan.mirror:
        mirrored = list(map(swap_left_right, captions)) if plan.swap else captions
        passes.append(encode_queries(model, tokenizer, mirrored))
    features = encode_gallery(model, images, plan) if features is None else features
    # one product of queries and gallery is the mean of the passes' similarities
    queries = torch.cat([feature for _, _, feature in passes], 1) / len(passes)    # (Q, passes * E)
    gallery = features[:, :len(passes)].flatten(1)                                 # (G, passes * E)
    with torch.autocast(queries.device.type, enabled=False):
        values, candidates = plan.nearest(queries, gallery, max(plan.k, FIRST), plan.workers)        # (Q, K)
    pairs = torch.stack([match_candidates(model, images, words, candidates[:, :plan.k], bool(i), plan)
                         for i, words in enumerate(passes)]).cpu()                 # (passes, Q, k, 2)
    match = (pairs[..., 1] - pairs[..., 0]).mean(0)                                # (Q, k)
    return Found(queries, gallery, values.cpu(), candidates.cpu(), match, pairs[..., 1])


def queries_of(source: RecordSet) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Captions and their identities (Q,), image paths and their identities (G,): every caption is a query."""
    captions = [clean(caption, source.name) for record in source.records for caption in record.captions]
    query_ids = torch.tensor([record.identity for record in source.records for _ in record.captions])
    gallery_ids = torch.tensor([record.identity for record in source.records])
    return captions, query_ids, [record.path for record in source.records], gallery_ids


def validate(model: Retriever, tokenizer: Tokenizer, val: RecordSet, fused: bool, plan: Plan,
             autocast: AbstractContextManager = nullcontext()) -> dict:
    """Metrics on val by embeddings and, if the fusion encoder is trained (`fused`), re-ranked with the best weight.

    Checkpoints are compared by "quality": first `fused`, then the last stage. `autocast` is for the encoders alone.
    """
    captions, query_ids, paths, gallery_ids = queries_of(val)
    model.eval()
    with autocast:
        found = search(model, tokenizer, captions, paths, plan)
    embedded, = found.metrics(query_ids, gallery_ids, found.candidates)
    result = {"embeddings": embedded, "quality": [fused, quality(embedded)]}
    if fused:
        weight, reranked = choose_weight(found, query_ids, gallery_ids)
        result |= {"reranked": reranked, "weight": weight, "quality": [fused, quality(reranked)]}
    return result
