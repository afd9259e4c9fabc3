"""Top-k of large galleries, which may lie in a mapped file. mra/ranking.py has `top_k` for a whole matrix of scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mra.workers import Workers


def top_k(queries: Tensor, gallery: Tensor, k: int, chunk: int = 65536,
          queries_at_once: int = 512) -> tuple[Tensor, Tensor]:
    """The k best, at most G, of gallery (G, E) for each query (Q, E): similarities and indices (Q, k), best first.

    Equal similarities stand in the order of their indices. The gallery is read once, `chunk` rows at a time, and
    compared in the queries' precision on their device. The tensor of a mapped file stays on disk.
    """
    blocks = queries.split(queries_at_once)
    best = [(q.new_empty(len(q), 0), q.new_empty(len(q), 0, dtype=torch.long)) for q in blocks]
    for start in range(0, len(gallery), chunk):
        rows = gallery[start:start + chunk].to(queries)                    # (c, E)
        for i, block in enumerate(blocks):
            values, indices = first_k(block @ rows.T, k)                   # (q, k)
            best[i] = merged([best[i], (values, indices + start)], k)
    return tuple(map(torch.cat, zip(*best)))


def sharded_top_k(queries: Tensor, gallery: Tensor, k: int, workers: Workers,
                  chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """`top_k` of the same gallery (G, E) by all workers, each on its own stretch of it; all get the whole result."""
    own = workers.own_rows(math.ceil(len(gallery) / workers.count))
    values, indices = top_k(queries, gallery[own], k, chunk)
    missing = min(k, len(gallery)) - values.shape[1]                       # a stretch may be shorter than k
    values, indices = F.pad(values, (0, missing), value=-torch.inf), F.pad(indices + own.start, (0, missing))
    return merged(list(zip(workers.exchange(values), workers.exchange(indices))), values.shape[1])


def first_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of scores (q, c), the first of equal ones, and their columns in ascending order."""
    k = min(k, scores.shape[1])
    columns = scores.topk(k, dim=1).indices                                # any of equal ones
    lowest = scores.gather(1, columns).amin(1, keepdim=True)
    tied = ((scores >= lowest).sum(1) > k).nonzero().squeeze(1)            # few rows
    columns[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(1).values
    return scores.gather(1, columns), columns


def merged(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best (q, k) of several lists of similarities and indices; earlier lists hold lower indices."""
    values, indices = (torch.cat(x, 1) for x in zip(*parts))
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)
