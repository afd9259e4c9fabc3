"""The contrastive loss of losses.py for batches of any size, and for batches that several workers share.

The N x N logits exist only as tiles. The forward pass takes their log-sum-exp in both directions at once, and the
backward pass computes the tiles again. Each worker computes the tiles of its own rows: features are exchanged, logits
never. Tiles have few shapes, so that N may vary with few compilations.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mra import losses
from mra.workers import Workers

PLAIN = 1024     # pairs up to which the whole matrix is computed: it is small, and tiles are slower
TILES = {"cuda": (4096, 8192), "cpu": (1024, 1024)}    # most rows and columns of a tile


class Compiled:
    """A function of tensors, compiled at its first call. If compiling fails, it says so once and runs uncompiled."""

    possible = True

    def __init__(self, function: Callable):
        self.function, self.compiled = function, None

    def __call__(self, *tensors: Tensor):
        if Compiled.possible:
            try:
                self.compiled = self.compiled or torch.compile(self.function, fullgraph=True, dynamic=False)
                return self.compiled(*tensors)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"torch.compile failed ({reason}): similarities are computed uncompiled.", flush=True)
                Compiled.possible = False
        return self.function(*tensors)


def contrastive(image: Tensor, text: Tensor, temperature: Tensor | float, ids: Tensor, smoothing: float = 0.0,
                workers: Workers = Workers()) -> Tensor:
    """`losses.contrastive` of the pairs of all workers, from this worker's own, in memory of O(N E); a scalar.

    L = 1/N [sum_i (lse_j l_ij + lse_j l_ji) / 2 - sum_i sum_j target_ij l_ij],    l_ij = image_i . text_j / temperature
    which is losses.contrastive because the targets are symmetric and each row sums to one.

    image, text (B, E) of unit length, ids (B,), B the same for every worker: N = workers x B pairs. Each worker returns
    the joint loss, and the mean of the workers' gradients is the joint gradient. Under autocast features are rounded to
    its precision; tiles keep their products in float32, the whole matrix does not.
    """
    device = image.device.type
    if len(image) * workers.count <= PLAIN:
        return losses.contrastive(workers.gathered(image), workers.gathered(text), temperature, workers.gathered(ids),
                                  smoothing)
    if torch.is_autocast_enabled(device):
        image, text = (x.to(torch.get_autocast_dtype(device)) for x in (image, text))
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = 1 / torch.as_tensor(temperature, dtype=wide, device=image.device)
    # tiles are compiled by themselves, so a compiled model skips them; as a decorator `disable` would load the
    # compiler, which takes two seconds, in every process that imports this file
    tiled = torch.compiler.disable(Contrastive.apply)
    with torch.autocast(device, enabled=False):
        return tiled(image, text, scale, ids, smoothing, workers)


class Contrastive(torch.autograd.Function):
    """The loss above. It keeps features and vectors of N numbers. Autograd rounds its gradients as the features are."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, ids: Tensor, smoothing: float,
                workers: Workers) -> Tensor:
        texts, ids, own = workers.gathered(text), workers.gathered(ids), workers.own_rows(len(text))   # (N, E), (N,)
        lse_row, lse_column = log_sum_exps(image, texts, scale)                                        # (B,), (N,)
        lse_column = workers.gathered(lse_column[None]).logsumexp(0)                                   # (N,)
        aligned, counts = label_term(image, texts, ids, own, smoothing)                                # scalar, (N,)
        loss = lse_row.sum() / 2 + lse_column[own].sum() / 2 - scale * aligned
        ctx.workers = workers
        ctx.save_for_backward(image, texts, scale, lse_row, lse_column, ids, (1 - smoothing) / counts,
                              loss.new_full((), smoothing / len(texts)))
        return workers.summed(loss) / len(texts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        image, texts, scale, lse_row, lse_column, ids, weight, floor = ctx.saved_tensors
        own = ctx.workers.own_rows(len(image))
        with torch.autocast(image.device.type, enabled=False):
            to_image, to_text = pull_back((image, lse_row, ids[own], weight[own]), (texts, lse_column, ids), scale,
                                          floor)                                       # (B, E), (N, E)
        to_text = ctx.workers.summed(to_text)[own]                                     # (B, E)
        upstream = upstream * ctx.workers.count / len(texts)
        to_scale = upstream * (image * to_image).sum()
        return to_image.mul_(upstream * scale), to_text.mul_(upstream * scale), to_scale, None, None, None


def label_term(image: Tensor, texts: Tensor, ids: Tensor, own: slice, smoothing: float) -> tuple[Tensor, Tensor]:
    """sum_i sum_j target_ij image_i . text_j without any pair, and the number of pairs of each one's identity (N,).

    = (1 - smoothing) sum_identities (sum of its images) . (sum of its texts) / number of its texts
      + smoothing (sum of all images) . (mean of all texts);    image (B, E) is at `own` among texts (N, E), ids (N,)
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    ordered, order = ids.sort()
    group = torch.zeros_like(ids)                                                      # identities as 0, 1, 2, ...
    group[order[1:]] = (ordered[1:] != ordered[:-1]).cumsum(0)
    image, texts = image.to(dtype), texts.to(dtype)
    counts = texts.new_zeros(len(ids)).index_add_(0, group, texts.new_ones(len(ids)))
    image_sums = torch.zeros_like(texts).index_add_(0, group[own], image)
    text_sums = torch.zeros_like(texts).index_add_(0, group, texts)
    same = (image_sums.mul_(text_sums).sum(1) / counts.clamp(min=1)).sum()
    return (1 - smoothing) * same + smoothing * (image.sum(0) * texts.mean(0)).sum(), counts[group]


def log_sum_exps(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of scale * image @ text.T over its columns (B,) and over its rows (N,), tile by tile."""
    sizes = TILES[scale.device.type]
    rows, columns = cut(sizes[0], image), cut(sizes[1], text)
    row_sums, column_sums = ([scale.new_full((len(x),), -torch.inf) for x, _ in tiles] for tiles in (rows, columns))
    for row, row_sum in zip(rows, row_sums):
        for column, column_sum in zip(columns, column_sums):
            of_rows, of_columns = tile_log_sum_exps(*row, *column, scale)
            torch.logaddexp(row_sum, of_rows, out=row_sum)
            torch.logaddexp(column_sum, of_columns, out=column_sum)
    return torch.cat(row_sums)[:len(image)], torch.cat(column_sums)[:len(text)]


@Compiled
def tile_log_sum_exps(image: Tensor, image_keep: Tensor, text: Tensor, text_keep: Tensor,
                      scale: Tensor) -> tuple[Tensor, Tensor]:
    """One tile's share of both, each in two steps: a short sum stays in registers, so each score is read once."""
    scores = logits(image, text, scale).where(image_keep[:, None] & text_keep, -torch.inf)      # (R, C)
    height, width = scores.shape
    return (scores.unflatten(1, (-1, math.gcd(width, 1024))).logsumexp(2).logsumexp(1),
            scores.unflatten(0, (-1, math.gcd(height, 64))).logsumexp(1).logsumexp(0))


def pull_back(own: tuple[Tensor, ...], every: tuple[Tensor, ...], scale: Tensor,
              floor: Tensor) -> tuple[Tensor, Tensor]:
    """slopes @ text (B, E) and slopes.T @ image (N, E), tile by tile; arguments as of `tile_slopes`, without keep."""
    sizes = TILES[scale.device.type]
    rows, columns = cut(sizes[0], *own), cut(sizes[1], *every)
    to_image, to_text = (scale.new_zeros(len(tiles), *tiles[0][0].shape) for tiles in (rows, columns))
    for row, to_row in zip(rows, to_image):
        for column, to_column in zip(columns, to_text):
            slopes = tile_slopes(row, column, scale, floor)                            # (R, C)
            add_product(to_row, slopes, column[0])
            add_product(to_column, slopes.T, row[0])
    return to_image.flatten(0, 1)[:len(own[0])], to_text.flatten(0, 1)[:len(every[0])]


@Compiled
def tile_slopes(row: tuple[Tensor, ...], column: tuple[Tensor, ...], scale: Tensor, floor: Tensor) -> Tensor:
    """N times the loss's slope at each logit of a tile (R, C), in the features' precision; 0 in the padding.

    slope_ij = (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j)) / 2 - target_ij
    target_ij = weight_i same_ij + floor,    weight_i = (1 - smoothing) / number of same,    floor = smoothing / N
    row: image (R, E), lse_row, ids, weight and keep (R,);    column: text (C, E), lse_column, ids and keep (C,)
    """
    image, lse_row, row_ids, weight, row_keep = row
    text, lse_column, column_ids, column_keep = column
    scores = logits(image, text, scale)                                                # (R, C)
    chances = ((scores - lse_row[:, None]).exp() + (scores - lse_column).exp()) / 2
    slopes = chances - (row_ids[:, None] == column_ids) * weight[:, None] - floor
    return slopes.where(row_keep[:, None] & column_keep, 0).to(image.dtype)


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


def cut(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Equal tiles of tensors (n, ...), the last padded with 0: for each tile its rows of all tensors, then its keep.

    There are as few tiles as `size` allows, with 1/4, 2/4, 3/4 or 4/4 of its rows: little padding, few shapes.
    """
    n, step = len(tensors[0]), math.ceil(size / 4)
    count = math.ceil(n / size)
    rows = math.ceil(n / count / step) * step
    keep = torch.arange(count * rows, device=tensors[0].device) < n
    missing = count * rows - n
    whole = [torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.detach() for x in tensors]
    return list(zip(*(x.split(rows) for x in (*whole, keep))))


def mean_where(values: Tensor, counts: Tensor, workers: Workers) -> Tensor:
    """`losses.mean_where` of the values of all workers: a share of it whose mean over workers is the joint mean."""
    count = workers.summed(counts.sum().float())
    return (values * counts).sum() * workers.count / count.clamp(min=1)
