"""Two-stage search and its metrics: embeddings rank the gallery, the fusion encoder re-scores the first k images.

The images after the first k keep their order by similarity. The score of a candidate is match logit + weight *
similarity: the fusion encoder's [matched] - [mismatched], and the cosine of the embeddings. The weight is chosen on
val, and the checkpoint keeps it. With `Settings.mirror` both stages average two passes: images and captions as they
are, then mirrored images and captions with left and right exchanged. Read next: diffusion/, evaluate.py.
"""

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
from mra.data.words import swap_left_right
from mra.group import Group
from mra.retriever import Retriever

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
FIRST = 10                          # images shown for each query
BLOCK = 512                         # queries encoded, or compared with the gallery, at a time
CHUNK = 65536                       # gallery images compared at a time
WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)    # of the similarity, to choose from
IMAGES = 16                         # images whose keys and values are held at a time
TOKENS = {"cuda": 65536, "cpu": 8192}    # of captions in one pass of the fusion encoder, about


# ---- metrics

def metric_rows(order: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """METRICS of each query (Q', 5) from order (Q, G), the gallery's indices, best first; ids are (Q,) and (G,).

    A query without a right image is left out. mINP: mean of right images / rank of the last one (Ye et al. 2021).
    """
    hit = gallery_ids[order] == query_ids[:, None]                                 # (Q, G)
    hit = hit[hit.any(1)].double()
    rank = torch.arange(1, hit.shape[1] + 1, device=hit.device)                    # (G,)
    recalls = [hit[:, :k].amax(1) for k in (1, 5, 10)]
    right = hit.sum(1)
    precision = (hit.cumsum(1) / rank * hit).sum(1) / right
    return torch.stack([*recalls, precision, right / (hit * rank).amax(1)], 1)


def means(rows: Tensor) -> dict[str, float]:
    """METRICS in percent from those of each query (Q', 5); nan if no query has a right image."""
    return dict(zip(METRICS, (100 * rows.mean(0)).tolist()))


def retrieval_metrics(scores: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> dict[str, float]:
    """METRICS in percent of a matrix of scores (Q, G), higher is better; ids are (Q,) and (G,)."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return means(metric_rows(order, query_ids, gallery_ids))


def selection_score(metrics: dict[str, float]) -> float:
    """Chooses the similarity's weight and the best checkpoint: the mean of R@1 and mAP varies less than R@1."""
    return (metrics["R@1"] + metrics["mAP"]) / 2


# ---- search

@dataclass(frozen=True)
class Settings:
    """How to search. The group shares out the images, and all get the same result."""

    k: int                          # candidates that the fusion encoder re-scores, at most G; 0: none
    mirror: bool = True             # average over the mirror images
    batch: int = 64                 # images encoded at a time
    workers: int = 0                # image decoding processes
    group: Group = Group()
    listed: int = FIRST             # images found for each query, at least


@dataclass(frozen=True)
class Found:
    """The result of a search for Q queries in G images: K candidates of each query, the first k of them re-scored."""

    queries: Tensor         # (Q, E') features of all passes / their number: queries @ gallery.T is the mean similarity
    gallery: Tensor         # (G, E') may lie in a file
    similarity: Tensor      # (Q, K) of the candidates; this and what follows is on the CPU
    candidates: Tensor      # (Q, K) indices of the most similar images, best first
    match_logit: Tensor     # (Q, k) [matched] - [mismatched], the mean of the passes

    def reranked(self, weight: float) -> Tensor:
        """The candidates (Q, K), the first k ordered by match_logit + weight * similarity."""
        k = self.match_logit.shape[1]
        score = self.match_logit + weight * self.similarity[:, :k]
        order = score.argsort(dim=1, descending=True, stable=True)
        return torch.cat([self.candidates[:, :k].gather(1, order), self.candidates[:, k:]], 1)

    def metrics(self, query_ids: Tensor, gallery_ids: Tensor, leading: Tensor) -> dict[str, float]:
        """METRICS in percent of `leading` (Q, K), an order of the candidates; all other images follow by similarity."""
        rows = []
        for some in torch.arange(len(query_ids)).split(BLOCK):
            with torch.autocast(self.queries.device.type, enabled=False):
                scores = self.queries[some] @ self.gallery.to(self.queries).T                    # (q, G)
            scores.scatter_(1, self.candidates[some].to(scores.device), torch.inf)               # candidates are first
            order = scores.argsort(dim=1, descending=True, stable=True).cpu()
            order[:, :leading.shape[1]] = leading[some]
            rows.append(metric_rows(order, query_ids[some], gallery_ids))
        return means(torch.cat(rows))


@torch.inference_mode()
def search(model: Retriever, tokenizer: Tokenizer, captions: list[str], paths: list[str], settings: Settings,
           features: Tensor | None = None, example: Tensor | None = None) -> Found:
    """Rank the images `paths` for every caption. `features` (G, passes, E) are those of `encode_gallery`, if known.

    `example` (passes, E): a picture's features. Similarity is the mean of its own and the caption's, if not empty.
    """
    images, spoken = Images(paths, model.config), [captions]
    if settings.mirror:
        spoken.append([swap_left_right(caption) for caption in captions])
    passes = [encode_queries(model, tokenizer, some, fuse=settings.k > 0) for some in spoken]
    if features is None:
        features = encode_gallery(model, images, settings)
    queries = torch.stack([feature for _, _, feature in passes], 1)                # (Q, passes, E)
    if example is not None:
        worded = torch.tensor([bool(caption) for caption in captions], device=queries.device)[:, None, None]
        queries = torch.where(worded, (queries + example) / 2, example)
    # one product of queries and gallery is the mean of the passes' similarities
    queries = queries.flatten(1) / len(passes)                                     # (Q, passes * E)
    gallery = features[:, :len(passes)].flatten(1)                                 # (G, passes * E)
    with torch.autocast(queries.device.type, enabled=False):
        values, candidates = top_k(queries, gallery, max(settings.k, settings.listed))      # (Q, K)
    match = match_candidates(model, images, passes, candidates[:, :settings.k], settings)  # (Q, k)
    return Found(queries, gallery, values.cpu(), candidates.cpu(), match.cpu())


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
                   fuse: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Captions -> tokens (Q, T, D) from `fusion_encoder.start`, none unless `fuse`; keep (Q, T); features (Q, E)."""
    device = next(model.parameters()).device
    pieces = [tokenizer.encode(caption, model.config.max_tokens) for caption in captions]
    ids, keep = (x.to(device) for x in pad(pieces, tokenizer.pad_id))              # (Q, T), (Q, T)
    started, features = [], []
    for own_ids, own_keep in zip(ids.split(BLOCK), keep.split(BLOCK)):
        tokens, feature = model.encode_text(own_ids, own_keep)
        started.append(model.fusion_encoder.start(tokens, own_keep) if fuse else tokens[:, :0])
        features.append(feature.float())
    return torch.cat(started), keep, torch.cat(features)


@torch.inference_mode()
def encode_gallery(model: Retriever, images: Dataset, settings: Settings) -> Tensor:
    """Unit features (G, 2, E) of the images and of their mirror images; (G, 1, E) without `settings.mirror`."""
    device = next(model.parameters()).device
    features = torch.zeros(len(images), 2 if settings.mirror else 1, model.config.embed, device=device)
    own = settings.group.own_rows(len(images), settings.batch)
    batches = loader(images, settings.workers, batch_size=settings.batch, sampler=own)
    for start, image in zip(own[::settings.batch], batches):
        image = image.to(device)
        features[start:start + settings.batch, 0] = model.encode_image(image)[1].float()
        if settings.mirror:
            features[start:start + settings.batch, 1] = model.encode_image(image.flip(-1))[1].float()
    return settings.group.summed(features)


def top_k(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best, at most G, of gallery (G, E) for each query (Q, E): similarities and indices (Q, k), best first.

    Equal ones are returned in the order of their indices. The gallery may lie in a mapped file, and stays there.
    """
    found = []
    for some in queries.split(BLOCK):
        values = some.new_empty(len(some), 0)
        indices = torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        for start in range(0, len(gallery), CHUNK):
            scores = some @ gallery[start:start + CHUNK].to(some).T                # (q, c)
            least, columns = scores.topk(min(k, scores.shape[1]))
            tied = (scores >= least[:, -1:]).sum(1) > columns.shape[1]             # of equal last ones topk takes any
            columns[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :columns.shape[1]]
            columns = columns.sort().values                                        # ascending, for the stable sort
            values = torch.cat([values, scores.gather(1, columns)], 1)
            indices = torch.cat([indices, start + columns], 1)
            order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
            values, indices = values.gather(1, order), indices.gather(1, order)    # (q, k)
        found.append((values, indices))
    return tuple(torch.cat(blocks) for blocks in zip(*found))


@torch.inference_mode()
def match_candidates(model: Retriever, images: Dataset, passes: list[tuple[Tensor, ...]], candidates: Tensor,
                     settings: Settings) -> Tensor:
    """The logit [matched] - [mismatched] (Q, k) of each query with its candidates (Q, k), the mean of the passes.

    passes: `encode_queries` of the captions for the images and, perhaps, of those for the mirror images. The keys and
    values of an image are computed once, and not copied. A step fuses about TOKENS tokens of pairs, of similar length,
    with IMAGES images. It holds their keys and values, and what one block computes for TOKENS tokens.
    """
    device, k = candidates.device, candidates.shape[1]
    needed, place_of = candidates.unique(return_inverse=True)                      # (G',), and (Q, k) indices into it
    place_of = place_of.flatten()                                                  # (Q * k,) of every pair's image
    tokens_of = [keep.sum(1).repeat_interleave(k) for _, keep, _ in passes]        # (Q * k,) of every pair's text
    match = torch.zeros(len(place_of), device=device)
    batch = min(settings.batch, IMAGES)
    pairs_of = place_of.argsort(stable=True).split((place_of // batch).bincount().tolist())    # of each image batch
    own = settings.group.own_rows(len(needed), batch)
    batches = loader(images, settings.workers, batch_size=batch, sampler=needed[own].tolist())
    for start, image in zip(own[::batch], batches):
        image = image.to(device)
        for view, (text, keep, _), tokens in zip((image, image.flip(-1)), passes, tokens_of):   # (Q, T, D), (Q, T)
            keys_values = model.fusion_encoder.keys_values(model.image_encoder(view))
            for pairs in bucketed(pairs_of[start // batch], tokens, TOKENS[device.type]):
                longest = int(tokens[pairs].max())
                pairs = pairs[place_of[pairs].argsort(stable=True)]                # those of an image side by side
                query, row = pairs // k, place_of[pairs] - start                   # row of the keys and values
                logits = model.matching_logits(model.fusion_encoder.fused_cls(
                    text[query, :longest], keep[query, :longest], keys_values, row))
                match[pairs] += (logits[:, 1] - logits[:, 0]) / len(passes)
    return settings.group.summed(match).view(candidates.shape)


def bucketed(pairs: Tensor, tokens_of: Tensor, limit: int) -> tuple[Tensor, ...]:
    """The pairs (P,) by the length of their texts, in parts of about `limit` tokens; tokens_of: of each pair's text."""
    pairs = pairs[tokens_of[pairs].argsort(stable=True)]
    last = tokens_of[pairs].cumsum(0) - 1               # tokens before the last one of each text
    _, sizes = (last // limit).unique_consecutive(return_counts=True)
    return pairs.split(sizes.tolist())


def queries_of(records: RecordSet, tokenizer: Tokenizer) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Captions and their identities (Q,), image paths and their identities (G,): every caption is a query."""
    captions = [tokenizer.clean(caption, records.name) for record in records.records for caption in record.captions]
    query_ids = torch.tensor([record.identity for record in records.records for _ in record.captions])
    images = [record for record in records.records if record.path]
    gallery_ids = torch.tensor([record.identity for record in images])
    return captions, query_ids, [record.path for record in images], gallery_ids


def choose_weight(found: Found, query_ids: Tensor, gallery_ids: Tensor) -> tuple[float, dict[str, float]]:
    """The weight among WEIGHTS with the best `selection_score`, and its metrics; for val alone."""
    results = {weight: found.metrics(query_ids, gallery_ids, found.reranked(weight)) for weight in WEIGHTS}
    best = max(WEIGHTS, key=lambda weight: selection_score(results[weight]))
    return best, results[best]


def validate(model: Retriever, tokenizer: Tokenizer, val: RecordSet, fused: bool, settings: Settings) -> dict:
    """Metrics on val by embeddings and, if the fusion encoder is trained (`fused`), re-ranked with the best weight."""
    captions, query_ids, paths, gallery_ids = queries_of(val, tokenizer)
    model.eval()
    found = search(model, tokenizer, captions, paths, settings)
    embedded = found.metrics(query_ids, gallery_ids, found.candidates)
    # checkpoints are compared by this list, so one that re-ranks is better than any that does not
    result = {"embeddings": embedded, "selected_by": [fused, selection_score(embedded)]}
    if fused:
        weight, reranked = choose_weight(found, query_ids, gallery_ids)
        result |= {"reranked": reranked, "weight": weight, "selected_by": [fused, selection_score(reranked)]}
    return result
