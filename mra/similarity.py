"""Similarity without the whole matrix in memory: contrastive loss, regions, top-k of large galleries.

The contrastive loss is that of losses.py (ITC and RPC of MRA section 3) for batches of any size: the N x N logits
exist only as tiles, whose log-sum-exp is taken in both directions at once and which the backward pass makes again.
With several processes each makes the tiles of its own rows; features travel, logits never. A tile's mathematics is
compiled where there is a compiler; tiles have few shapes, so that N may vary with few recompilations.
Before: losses.py. After: retriever.py.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mra import losses

PLAIN = 1024     # pairs up to which the whole matrix is made after all: it is small then, and tiles are slower
TILES = {"cuda": (4096, 8192), "cpu": (1024, 1024)}    # rows, columns: work enough to hide what a launch costs


class Compiled:
    """A function of tensors, compiled when first called; where that is impossible it says so once and runs as it is."""

    possible = True

    def __init__(self, function: Callable):
        self.function = function

    @functools.cached_property
    def compiled(self) -> Callable:
        return torch.compile(self.function, fullgraph=True, dynamic=False)

    def __call__(self, *tensors: Tensor):
        if Compiled.possible:
            try:
                return self.compiled(*tensors)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"torch.compile failed ({reason}): similarities are computed uncompiled.", flush=True)
                Compiled.possible = False
        return self.function(*tensors)


# ---- contrastive loss

def contrastive(image: Tensor, text: Tensor, temperature: Tensor | float, ids: Tensor, smoothing: float = 0.0,
                tile: tuple[int, int] | None = None) -> Tensor:
    """`losses.contrastive` of the pairs of all processes, from this process's own, in memory of O(N E); a scalar.

    L = 1/N [sum_i (lse_j l_ij + lse_j l_ji) / 2 - sum_i sum_j target_ij l_ij],    l_ij = image_i . text_j / temperature
    which is losses.contrastive because the targets are symmetric and each row sums to one.

    image, text (B, E) of unit length, ids (B,), B the same in every process: N = processes x B pairs. Under autocast
    features are compared in its precision; tiles keep their products in float32, without tiles these are rounded, too.
    Each process returns the joint loss; its gradients are such that the mean over processes, which
    DistributedDataParallel takes, is the joint gradient. `tile` (rows, columns) forces tiles of at most that size; left
    out, they suit the device, and up to PLAIN pairs there are none.
    """
    device = image.device.type
    if tile is None and len(image) * processes() <= PLAIN:
        return losses.contrastive(gathered(image), gathered(text), temperature, gathered(ids), smoothing)
    if torch.is_autocast_enabled(device):
        image, text = (x.to(torch.get_autocast_dtype(device)) for x in (image, text))
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = 1 / torch.as_tensor(temperature, dtype=wide, device=image.device)
    # a compiled model calls this as it is, since tiles are compiled by themselves; a decorator would do the same, but
    # load the compiler, two seconds, in every process that imports this
    tiled = torch.compiler.disable(_tiled)
    return tiled(image, text, scale, ids, smoothing, tile or TILES.get(device, TILES["cpu"]))


def _tiled(image: Tensor, *rest) -> Tensor:
    with torch.autocast(image.device.type, enabled=False):
        return Contrastive.apply(image, *rest)


class Contrastive(torch.autograd.Function):
    """The loss above; keeps features and vectors of N numbers. Autograd rounds its gradients as the features are."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, smoothing: float, tile: tuple) -> Tensor:
        ctx.tile = tile
        texts, ids, own = gathered(text), gathered(ids), own_rows(len(text))           # (N, E), (N,)
        lse_row, lse_column = log_sum_exps(image, texts, scale, tile)                  # (B,), (N,)
        lse_column = gathered(lse_column[None]).logsumexp(0)                           # (N,)
        aligned, counts = label_term(image, texts, ids, smoothing, scale.dtype)        # scalar, (N,)
        loss = lse_row.sum() / 2 + lse_column[own].sum() / 2 - scale * aligned
        ctx.save_for_backward(image, texts, scale, lse_row, lse_column, ids, (1 - smoothing) / counts,
                              loss.new_full((), smoothing / len(texts)))
        return summed(loss) / len(texts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        image, texts, scale = ctx.saved_tensors[:3]
        with torch.autocast(image.device.type, enabled=False):
            to_image, to_text = pulled_back(*ctx.saved_tensors, ctx.tile)              # (B, E), (N, E)
        to_text = summed(to_text)[own_rows(len(image))]                                # (B, E)
        upstream = upstream * processes() / len(texts)
        to_scale = upstream * (image * to_image).sum()
        return to_image.mul_(upstream * scale), to_text.mul_(upstream * scale), to_scale, None, None, None


def label_term(image: Tensor, texts: Tensor, ids: Tensor, smoothing: float,
               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sum_i sum_j target_ij image_i . text_j without any pair, and how many have each one's identity (N,).

    = (1 - smoothing) sum_identities (sum of its images) . (sum of its texts) / number of its texts
      + smoothing (sum of all images) . (mean of all texts);    image (B, E) of this process, texts (N, E), ids (N,)
    """
    ordered, order = ids.sort()
    group = torch.zeros_like(ids)                                                      # identities as 0, 1, 2, ...
    group[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum(0)
    image, texts = image.to(dtype), texts.to(dtype)
    counts = texts.new_zeros(len(ids)).index_add_(0, group, texts.new_ones(len(ids)))
    of_images = torch.zeros_like(texts).index_add_(0, group[own_rows(len(image))], image)
    of_texts = torch.zeros_like(texts).index_add_(0, group, texts)
    same = (of_images.mul_(of_texts).sum(1) / counts.clamp(min=1)).sum()
    return (1 - smoothing) * same + smoothing * (image.sum(0) * texts.mean(0)).sum(), counts[group]


def log_sum_exps(image: Tensor, text: Tensor, scale: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of scale * image @ text.T over its columns (B,) and over its rows (N,), tile by tile."""
    (images, image_keep), (texts, text_keep) = cut(tile[0], image), cut(tile[1], text)
    rows, columns = (x.new_full(keep.shape, -torch.inf, dtype=scale.dtype)
                     for x, keep in ((image, image_keep), (text, text_keep)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            of_rows, of_columns = tile_log_sum_exps(images[i], texts[j], scale, image_keep[i], text_keep[j])
            torch.logaddexp(row, of_rows, out=row)
            torch.logaddexp(column, of_columns, out=column)
    return rows.flatten()[:len(image)], columns.flatten()[:len(text)]


@Compiled
def tile_log_sum_exps(image: Tensor, text: Tensor, scale: Tensor, image_keep: Tensor,
                      text_keep: Tensor) -> tuple[Tensor, Tensor]:
    """One tile's share of both. In two steps each: a short sum stays in registers, so a score is read once for it."""
    scores = logits(image, text, scale).where(image_keep[:, None] & text_keep, -torch.inf)      # (R, C)
    height, width = scores.shape
    return (scores.unflatten(1, (-1, math.gcd(width, 1024))).logsumexp(2).logsumexp(1),
            scores.unflatten(0, (-1, math.gcd(height, 64))).logsumexp(1).logsumexp(0))


def pulled_back(image: Tensor, text: Tensor, scale: Tensor, lse_row: Tensor, lse_column: Tensor, ids: Tensor,
                weight: Tensor, floor: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """slopes @ text (B, E) and slopes.T @ image (N, E), tile by tile; arguments as of `tile_slopes`, whole."""
    own = own_rows(len(image))
    images, lse_row, own_ids, weight, image_keep = cut(tile[0], image, lse_row, ids[own], weight[own])
    texts, lse_column, ids, text_keep = cut(tile[1], text, lse_column, ids)
    to_image, to_text = (torch.zeros_like(x, dtype=scale.dtype) for x in (images, texts))
    for i in range(len(images)):
        for j in range(len(texts)):
            slopes = tile_slopes(images[i], texts[j], scale, lse_row[i], lse_column[j], own_ids[i], ids[j], weight[i],
                                 floor, image_keep[i], text_keep[j])
            add_product(to_image[i], slopes, texts[j])
            add_product(to_text[j], slopes.T, images[i])
    return to_image.flatten(0, 1)[:len(image)], to_text.flatten(0, 1)[:len(text)]


@Compiled
def tile_slopes(image: Tensor, text: Tensor, scale: Tensor, lse_row: Tensor, lse_column: Tensor, row_ids: Tensor,
                column_ids: Tensor, weight: Tensor, floor: Tensor, image_keep: Tensor, text_keep: Tensor) -> Tensor:
    """N times the loss's slope at each logit of a tile (R, C), in the features' precision; 0 in the padding.

    slope_ij = (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j)) / 2 - target_ij
    target_ij = weight_i same_ij + floor,    weight_i = (1 - smoothing) / number of same,    floor = smoothing / N
    """
    scores = logits(image, text, scale)                                                # (R, C)
    chances = ((scores - lse_row[:, None]).exp() + (scores - lse_column).exp()) / 2
    slopes = chances - (row_ids[:, None] == column_ids) * weight[:, None] - floor
    return slopes.where(image_keep[:, None] & text_keep, 0).to(image.dtype)


def logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """scale * image @ text.T (R, C), kept in float32: rounded to bf16, exp would be wrong in its second digit."""
    if image.is_cuda and image.dtype != scale.dtype:
        return torch.mm(image, text.T, out_dtype=scale.dtype) * scale
    return image.to(scale.dtype) @ text.T.to(scale.dtype) * scale


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def cut(size: int, *tensors: Tensor) -> list[Tensor]:
    """Tensors (n, ...) in equal tiles (tiles, rows, ...), the last padded with 0; then which rows are real, likewise.

    As few tiles as rows of `size` allow, of 1/4, 2/4, 3/4 or 4/4 of it: little padding, and few shapes to compile.
    """
    n, step = len(tensors[0]), math.ceil(size / 4)
    count = math.ceil(n / size)
    rows = math.ceil(n / count / step) * step
    keep = torch.arange(count * rows, device=tensors[0].device) < n
    missing = count * rows - n
    whole = [torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.detach() for x in tensors]
    return [x.unflatten(0, (count, rows)) for x in (*whole, keep)]


# ---- processes

def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_batches(count: int, batch: int) -> list[int]:
    """Which of `count` rows this process works on, where all share them out by whole batches."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [i for i in range(count) if i // batch % processes() == rank]


def own_rows(count: int) -> slice:
    """Where this process's `count` rows stand among those of all."""
    start = count * dist.get_rank() if dist.is_initialized() else 0
    return slice(start, start + count)


def gathered(x: Tensor) -> Tensor:
    """x (B, ...) of all processes, in rank order (W * B, ...), with gradients; x itself in a single process."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    own = x.clone()
    if own.requires_grad:    # every process computes the joint loss, and DDP takes the mean of their gradients
        own.register_hook(lambda gradient: gradient * len(parts))
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def summed(x: Tensor) -> Tensor:
    """x, added up over all processes in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ---- regions

def pool_regions(patches: Tensor, region_keep: Tensor) -> Tensor:
    """Mean (B, R, D) of the patches (B, N, D) that each of R regions touches, region_keep (B, R, N); 0 if none."""
    weights = region_keep.to(patches.dtype) / region_keep.sum(2, keepdim=True).clamp(min=1)      # (B, R, N)
    return weights @ patches


# ---- search

def top_k(queries: Tensor, gallery: Tensor, k: int, chunk: int = 65536,
          queries_at_once: int = 512) -> tuple[Tensor, Tensor]:
    """The k best, at most G, of gallery (G, E) for each query (Q, E): similarities and indices (Q, k), best first.

    Equal similarities stand in the order of their indices. The gallery is read once, `chunk` rows at a time, in the
    queries' precision and on their device; a mapped file's tensor, as of `safetensors.safe_open`, stays on disk.
    """
    best = [(q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.long, device=q.device))
            for q in queries.split(queries_at_once)]
    for start in range(0, len(gallery), chunk):
        rows = gallery[start:start + chunk].to(queries)                                # (c, E)
        for i, some in enumerate(queries.split(queries_at_once)):
            values, indices = first_k(some @ rows.T, k)                                # (q, k)
            best[i] = merged([best[i], (values, indices + start)], k)
    return tuple(map(torch.cat, zip(*best)))


def sharded_top_k(queries: Tensor, gallery: Tensor, k: int, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """`top_k` by all processes, each on its own stretch of the same gallery (G, E), merged once; all get the result."""
    own = own_rows(math.ceil(len(gallery) / processes()))
    values, indices = top_k(queries, gallery[own], k, chunk)
    short = min(k, len(gallery)) - values.shape[1]                                     # a stretch may be shorter than k
    values, indices = F.pad(values, (0, short), value=-torch.inf), F.pad(indices + own.start, (0, short))
    return merged(list(zip(gathered(values[None]), gathered(indices[None]))), values.shape[1])


def first_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of scores (q, c) and their columns, ascending; of equal ones the first columns."""
    k = min(k, scores.shape[1])
    columns = scores.topk(k, dim=1).indices                                            # which of equal ones is open
    lowest = scores.gather(1, columns).amin(1, keepdim=True)
    tied = ((scores >= lowest).sum(1) > k).nonzero().squeeze(1)                        # rows where that matters: few
    columns[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(1).values
    return scores.gather(1, columns), columns


def merged(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best (q, k) of several lists of similarities and indices, of which earlier lists hold lower indices."""
    values, indices = (torch.cat(x, 1) for x in zip(*parts))
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), indices.gather(1, order)
