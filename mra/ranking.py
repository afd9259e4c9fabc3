"""Two-stage search and its metrics: embeddings rank the gallery, the fusion encoder re-scores the first k.

A candidate's score is match + weight * similarity. Match is the fusion encoder's logit [matched] - [mismatched],
similarity the cosine of the embeddings. The weight says how much the similarity counts: with 0 the match alone orders
the candidates, with a large weight they keep the first stage's order. `choose_weight` takes the best one on val, and
the checkpoint keeps it. A score depends on its pair alone. In MRA section 3 scores are normalised over all pairs, so
a query's order depends on the other queries. With `Plan.mirror` both stages average two passes: one over images and
captions, one over mirrored images and captions with left and right exchanged. Read next: workers.py, evaluate.py.
"""

import math
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
BLOCK = 512                         # queries compared with the gallery at a time
CHUNK = 65536                       # gallery images that they are compared with at a time in a search
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
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)                    # (G,)
    recalls = [hit[:, :k].amax(1) for k in (1, 5, 10)]
    matches = hit.sum(1)
    precision = (hit.cumsum(1) / rank * hit).sum(1) / matches
    return torch.stack([*recalls, precision, matches / (hit * rank).amax(1)], 1)


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

    def reranked(self, weight: float) -> Tensor:
        """Gallery indices (Q, K): the first k by match + weight * similarity, the others as found."""
        k = self.match.shape[1]
        score = self.match + weight * self.similarity[:, :k]
        order = score.argsort(dim=1, descending=True, stable=True)
        return torch.cat([self.candidates[:, :k].gather(1, order), self.candidates[:, k:]], 1)

    def metrics(self, query_ids: Tensor, gallery_ids: Tensor, *firsts: Tensor) -> list[dict[str, float]]:
        """METRICS in percent of each order of the candidates (Q, K), all other images behind; nan without any match."""
        rows = [[] for _ in firsts]
        for some in torch.arange(len(query_ids)).split(BLOCK):
            scores = self.queries[some] @ self.gallery.to(self.queries).T                        # (q, G)
            scores.scatter_(1, self.candidates[some].to(scores.device), torch.inf)               # they stand first
            order = scores.argsort(dim=1, descending=True, stable=True).cpu()
            for own, first in zip(rows, firsts):
                order[:, :first.shape[1]] = first[some]
                own.append(metric_rows(order, query_ids[some], gallery_ids))
        return [means(own) for own in rows]


def choose_weight(found: Found, query_ids: Tensor, gallery_ids: Tensor) -> tuple[float, dict[str, float]]:
    """The weight among WEIGHTS with the best `quality`, and its metrics; for val alone."""
    results = found.metrics(query_ids, gallery_ids, *map(found.reranked, WEIGHTS))
    return max(zip(WEIGHTS, results), key=lambda pair: quality(pair[1]))


def quality(metrics: dict[str, float]) -> float:
    """What weights and checkpoints are chosen by, on val: the mean of R@1 and mAP varies less than R@1 alone."""
    return (metrics["R@1"] + metrics["mAP"]) / 2


# ---- search

def top_k(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best, at most G, of gallery (G, E) for each query (Q, E): similarities and indices (Q, k), best first.

    Equal similarities stand in the order of their indices. The gallery may lie in a mapped file, and stays there.
    """
    found = []
    for some in queries.split(BLOCK):
        values, indices = some.new_empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        for start in range(0, len(gallery), CHUNK):
            scores = some @ gallery[start:start + CHUNK].to(some).T                # (q, c)
            columns = first_columns(scores, min(k, scores.shape[1]))
            values = torch.cat([values, scores.gather(1, columns)], 1)
            indices = torch.cat([indices, start + columns], 1)
            order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
            values, indices = values.gather(1, order), indices.gather(1, order)    # (q, k)
        found.append((values, indices))
    return tuple(torch.cat(blocks) for blocks in zip(*found))


def first_columns(scores: Tensor, k: int) -> Tensor:
    """The columns (q, k) of the k highest scores of each row, in ascending order; of equal scores the first."""
    columns = scores.topk(k, dim=1).indices                                        # of equal scores any
    lowest = scores.gather(1, columns).amin(1, keepdim=True)
    tied = (scores >= lowest).sum(1) > k                                           # few rows are sorted as a whole
    columns[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return columns.sort(1).values


@dataclass(frozen=True)
class Plan:
    """How to search. Several workers share out the images: all must search, and all get the same result."""

    k: int                          # candidates that the fusion encoder re-scores, at most G; 0: none
    mirror: bool = True             # average over the mirror images
    batch: int = 64                 # images encoded at a time
    loading: int = 0                # image decoding processes
    workers: Workers = Workers()


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
    features = torch.zeros(len(images), 2 if plan.mirror else 1, model.config.embed, device=device)
    for start, image in zip(own[::plan.batch], loader(images, plan.loading, batch_size=plan.batch, sampler=own)):
        image = image.to(device)
        views = [image, image.flip(-1)] if plan.mirror else [image]
        features[start:start + plan.batch] = torch.stack([model.encode_image(view)[1].float() for view in views], 1)
    return plan.workers.summed(features)


@torch.inference_mode()
def match_candidates(model: Retriever, images: Dataset, passes: list[tuple[Tensor, ...]], candidates: Tensor,
                     plan: Plan) -> Tensor:
    """The logit [matched] - [mismatched] (Q, k) of each query with its candidates (Q, k), the mean of the passes.

    passes: `encode_queries` of the captions, then perhaps of those for the mirror images. Keys and values of an image
    are computed once for all queries that ask for it, and then forgotten. An image that no query asks for is not read.
    Queries of like length are matched together, padded to a multiple of 8: few shapes.
    """
    device = candidates.device
    wanted, places = candidates.unique(return_inverse=True)                        # (G',), and (Q, k) places in it
    own = plan.workers.own_batches(len(wanted), plan.batch)
    match = torch.zeros(places.numel(), device=device)
    batches = loader(images, plan.loading, batch_size=plan.batch, sampler=wanted[own].tolist())
    for start, image in zip(own[::plan.batch], batches):
        asked = ((places >= start) & (places < start + plan.batch)).flatten().nonzero().squeeze(1)   # pairs of it
        image = image.to(device)
        for view, (text, keep, _) in zip((image, image.flip(-1)), passes):         # (Q, T, D), (Q, T)
            keys_values = model.fusion_encoder.keys_values(model.image_encoder(view))
            fitting = GATHERED // sum(one[0].nbytes for one in keys_values)
            lengths = keep.sum(1)                                                  # (Q,)
            by_length = lengths[asked // places.shape[1]].argsort(stable=True)
            for some in asked[by_length].split(max(1, min(PAIRS[device.type], fitting))):
                query, column = some // places.shape[1], places.flatten()[some] - start
                longest = 8 * math.ceil(int(lengths[query].max()) / 8)             # slicing stops at T
                logits = model.match(text[query, :longest], keep[query, :longest],
                                     [one[column] for one in keys_values]).float()
                match[some] += (logits[:, 1] - logits[:, 0]) / len(passes)
    return plan.workers.summed(match).view(places.shape)


@torch.inference_mode()
def search(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], plan: Plan,
           features: Tensor | None = None) -> Found:
    """Rank the gallery `paths` for every caption: by similarity, and the first k by matching.

    `features` (G, 2, E) are those of `encode_gallery`, where they are known; they may lie in a file, and stay there.
    """
    images, passes = Images(paths, model.config), [encode_queries(model, tokenizer, captions)]
    if plan.mirror:
        passes.append(encode_queries(model, tokenizer, [swap_left_right(caption) for caption in captions]))
    features = encode_gallery(model, images, plan) if features is None else features
    # one product of queries and gallery is the mean of the passes' similarities
    queries = torch.cat([feature for _, _, feature in passes], 1) / len(passes)    # (Q, passes * E)
    gallery = features[:, :len(passes)].flatten(1)                                 # (G, passes * E)
    with torch.autocast(queries.device.type, enabled=False):
        values, candidates = top_k(queries, gallery, max(plan.k, FIRST))           # (Q, K)
    match = match_candidates(model, images, passes, candidates[:, :plan.k], plan)  # (Q, k)
    return Found(queries, gallery, values.cpu(), candidates.cpu(), match.cpu())


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
