"""The contrastive loss of losses.py for batches of any size, and for batches that several workers share.

The N x N logits exist only in chunks: a few rows, all columns. The forward pass keeps their log-sum-exp in both
directions, and the backward pass computes each chunk again. Each worker computes the rows of its own images: features
are exchanged, logits never.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mra import losses
from mra.workers import Workers

PLAIN = 1024    # pairs up to which the whole matrix is computed: it is small, and chunks are slower
ROWS = 1024     # most rows of a chunk


class Compiled:
    """A function of tensors, compiled at its first call. If compiling fails, it says so once and runs uncompiled."""

    possible = True

    def __init__(self, function: Callable):
        self.function, self.compiled = function, None

    def __call__(self, *tensors: Tensor):
        if Compiled.possible:
            try:
                # one compilation for all sizes
                self.compiled = self.compiled or torch.compile(self.function, fullgraph=True, dynamic=True)
                return self.compiled(*tensors)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"torch.compile failed ({reason}): similarities are computed uncompiled.", flush=True)
                Compiled.possible = False
        return self.function(*tensors)


def contrastive(image: Tensor, text: Tensor, temperature: Tensor | float, classes: Tensor, smoothing: float = 0.0,
                workers: Workers = Workers()) -> Tensor:
    """`losses.contrastive` of all workers' pairs, from this worker's own, in memory of O(N E) and one chunk; a scalar.

    L = 1/N sum_i [(lse_j l_ij + lse_j l_ji) / 2 - sum_j target_ij l_ij],    l_ij = image_i . text_j / temperature
    which is losses.contrastive because the targets are symmetric and each row sums to one.

    image, text (B, E) of unit length, classes (B,), B the same for every worker: N = workers x B pairs. Each worker
    returns the joint loss, and the mean of the workers' gradients is the joint gradient. Under autocast features are
    rounded to its precision; chunks keep their products in float32, the whole matrix does not.
    """
    device = image.device.type
    if len(image) * workers.count <= PLAIN:
        return losses.contrastive(workers.gathered(image), workers.gathered(text), temperature,
                                  workers.gathered(classes), smoothing)
    if torch.is_autocast_enabled(device):
        image, text = (x.to(torch.get_autocast_dtype(device)) for x in (image, text))
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = 1 / torch.as_tensor(temperature, dtype=wide, device=image.device)
    # chunks are compiled by themselves, so a compiled model skips them; as a decorator `disable` would load the
    # compiler, which takes two seconds, in every process that imports this file
    chunked = torch.compiler.disable(Contrastive.apply)
    with torch.autocast(device, enabled=False):
        return chunked(image, text, scale, classes, smoothing, workers)


class Contrastive(torch.autograd.Function):
    """The loss above. Saves features and N-vectors for the backward pass; gradients have the features' dtype."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, classes: Tensor, smoothing: float,
                workers: Workers) -> Tensor:
        texts, classes, own = workers.gathered(text), workers.gathered(classes), workers.own_rows(len(text))
        ordered = classes.sort().values                                                                # (N,)
        positives = torch.searchsorted(ordered, classes, right=True) - torch.searchsorted(ordered, classes)
        weight = (1 - smoothing) / positives[own].to(scale.dtype)                                      # (B,)
        columns = texts, classes, scale, scale.new_full((), smoothing / len(texts))
        lse_row, aligned = [], []
        lse_column = scale.new_full((len(texts),), -torch.inf)
        for rows in chunks(image, classes[own], weight):
            of_rows, of_columns, of_targets = sums(rows, columns)
            lse_row.append(of_rows)
            aligned.append(of_targets)
            torch.logaddexp(lse_column, of_columns, out=lse_column)
        lse_row, aligned = torch.cat(lse_row), torch.cat(aligned)                                      # (B,), (B,)
        lse_column = workers.gathered(lse_column[None]).logsumexp(0)                                   # (N,)
        ctx.workers = workers
        ctx.save_for_backward(image, weight, lse_row, lse_column, *columns)
        return workers.summed(((lse_row + lse_column[own]) / 2 - aligned).sum()) / len(texts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        image, weight, lse_row, lse_column, *columns = ctx.saved_tensors
        texts, classes, scale, _ = columns
        own = ctx.workers.own_rows(len(image))
        to_image, to_text = [], scale.new_zeros(texts.shape)                                           # (N, E)
        with torch.autocast(image.device.type, enabled=False):
            for lse, *rows in chunks(lse_row, image, classes[own], weight):
                slope = slopes(rows, columns, lse, lse_column)                                         # (R, N)
                to_image.append(product(slope, texts, scale.dtype))
                to_text += product(slope.T, rows[0], scale.dtype)
        to_image, to_text = torch.cat(to_image), ctx.workers.summed(to_text)[own]                      # (B, E), (B, E)
        upstream = upstream * ctx.workers.count / len(texts)
        to_scale = upstream * (image * to_image).sum()
        return to_image.mul_(upstream * scale), to_text.mul_(upstream * scale), to_scale, None, None, None


def chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of several tensors (B, ...), at most ROWS at a time, in parts of nearly equal length."""
    count = math.ceil(len(tensors[0]) / ROWS)
    return list(zip(*(x.tensor_split(count) for x in tensors)))


@Compiled
def sums(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk's logits: log-sum-exp of its rows (R,), of its columns (N,), and sum_j target_ij l_ij (R,)."""
    logits, targets = logits_and_targets(rows, columns)
    return logits.logsumexp(1), logits.logsumexp(0), (targets * logits).sum(1)


@Compiled
def slopes(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...], lse_row: Tensor, lse_column: Tensor) -> Tensor:
    """N times the loss's slope at each logit of a chunk (R, N), in the features' precision.

    slope_ij = (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j)) / 2 - target_ij
    """
    logits, targets = logits_and_targets(rows, columns)
    chances = ((logits - lse_row[:, None]).exp() + (logits - lse_column).exp()) / 2
    return (chances - targets).to(rows[0].dtype)


def logits_and_targets(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """l_ij = scale image_i . text_j and target_ij = weight_i [same class] + floor of one chunk, (R, N) each.

    rows: image (R, E), classes (R,), weight (R,) = (1 - smoothing) / number of positives
    columns: texts (N, E), classes (N,), scale (), floor () = smoothing / N
    """
    image, row_classes, weight = rows
    texts, classes, scale, floor = columns
    same = row_classes[:, None] == classes                                                             # (R, N)
    return product(image, texts.T, scale.dtype) * scale, same * weight[:, None] + floor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, float32 also where a and b are bf16: rounded to bf16, exp(logit) errs in its second digit."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def mean_where(values: Tensor, counts: Tensor, workers: Workers) -> Tensor:
    """`losses.mean_where` of the values of all workers: a share of it whose mean over workers is the joint mean."""
    count = workers.summed(counts.sum().float())
    return (values * counts).sum() * workers.count / count.clamp(min=1)
