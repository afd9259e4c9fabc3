"""The contrastive loss of losses.py for batches of any size, and for batches that several workers share.

The N x N logits exist only in chunks: a few rows, all columns. The forward pass keeps their log-sum-exp in both
directions, and the backward pass computes each chunk again, each as one kernel that torch.compile fuses. Each worker
computes the rows of its own images: features are exchanged, logits never.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mra import losses
from mra.workers import Workers

PLAIN = 1024    # pairs up to which the whole matrix is computed: it is small, and chunks are slower
ROWS = 1024     # of a chunk


def contrastive(image: Tensor, text: Tensor, temperature: Tensor | float, classes: Tensor, smoothing: float = 0.0,
                workers: Workers = Workers()) -> Tensor:
    """`losses.contrastive` of all workers' pairs, from this worker's own, in memory of O(N E) and one chunk; a scalar.

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
    # chunks are compiled by themselves, so a compiled model must not trace them; as a decorator `disable` would load
    # the compiler, which takes two seconds, in every process that imports this file
    chunked = torch.compiler.disable(Contrastive.apply)
    with torch.autocast(device, enabled=False):
        return chunked(image, text, scale, classes, smoothing, workers)


def distribution_matching(image: Tensor, text: Tensor, temperature: Tensor | float, classes: Tensor,
                          smoothing: float = 0.0, workers: Workers = Workers()) -> Tensor:
    """`losses.distribution_matching` of all workers' pairs, from this worker's own; it computes the whole matrix."""
    return losses.distribution_matching(workers.gathered(image), workers.gathered(text), temperature,
                                        workers.gathered(classes), smoothing)


class Contrastive(torch.autograd.Function):
    """The loss in chunks. Saves features and N-vectors for the backward pass; gradients have the features' dtype.

    L = 1/N sum_i [(lse_j l_ij + lse_j l_ji) / 2 - sum_j target_ij l_ij],    l_ij = scale image_i . text_j
    which is losses.contrastive because the targets are symmetric and each row sums to one.
    """

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, classes: Tensor, smoothing: float,
                workers: Workers) -> Tensor:
        texts, classes, own = workers.gathered(text), workers.gathered(classes), workers.own_rows(len(text))
        lse_row, aligned = [], []
        lse_column = scale.new_full((len(texts),), -torch.inf)                                         # (N,)
        for rows, row_classes in zip(image.split(ROWS), classes[own].split(ROWS)):
            of_rows, of_columns, of_targets = fused(sums)(rows, row_classes, texts, classes, scale, smoothing)
            lse_row.append(of_rows)
            aligned.append(of_targets)
            torch.logaddexp(lse_column, of_columns, out=lse_column)
        lse_row, aligned = torch.cat(lse_row), torch.cat(aligned)                                      # (B,), (B,)
        lse_column = workers.gathered(lse_column[None]).logsumexp(0)                                   # (N,)
        ctx.smoothing, ctx.workers = smoothing, workers
        ctx.save_for_backward(image, texts, scale, classes, lse_row, lse_column)
        return workers.summed(((lse_row + lse_column[own]) / 2 - aligned).sum()) / len(texts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        image, texts, scale, classes, lse_row, lse_column = ctx.saved_tensors
        own = ctx.workers.own_rows(len(image))
        to_image, to_text = [], scale.new_zeros(texts.shape)                                           # (N, E)
        with torch.autocast(image.device.type, enabled=False):
            for rows, row_classes, lse in zip(image.split(ROWS), classes[own].split(ROWS), lse_row.split(ROWS)):
                chunk = rows, row_classes, texts, classes, scale, ctx.smoothing
                slope = fused(slopes)(chunk, lse, lse_column)                                          # (R, N)
                to_image.append(product(slope, texts, scale.dtype))
                to_text += product(slope.T, rows, scale.dtype)
        to_image, to_text = torch.cat(to_image), ctx.workers.summed(to_text)[own]                      # (B, E), (B, E)
        upstream = upstream * ctx.workers.count / len(texts)
        to_scale = upstream * (image * to_image).sum()
        return to_image.mul_(upstream * scale), to_text.mul_(upstream * scale), to_scale, None, None, None


@cache
def fused(function: Callable) -> Callable:
    """The function, compiled for all sizes. If compiling fails, that is said once, and it runs uncompiled."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True)

    def call(*tensors):
        try:
            return compiled(*tensors) if call.possible else function(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"torch.compile failed ({reason}): similarities are computed uncompiled.", flush=True)
            call.possible = False
            return function(*tensors)

    call.possible = True
    return call


def sums(*chunk) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chunk's logits: log-sum-exp of its rows (R,), of its columns (N,), and sum_j target_ij l_ij (R,)."""
    logits, targets = logits_and_targets(*chunk)
    return logits.logsumexp(1), logits.logsumexp(0), (targets * logits).sum(1)


def slopes(chunk: tuple, lse_row: Tensor, lse_column: Tensor) -> Tensor:
    """N dL / dl_ij = (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j)) / 2 - target_ij, (R, N), in image's dtype."""
    logits, targets = logits_and_targets(*chunk)
    chances = ((logits - lse_row[:, None]).exp() + (logits - lse_column).exp()) / 2
    return (chances - targets).to(chunk[0].dtype)


def logits_and_targets(image: Tensor, row_classes: Tensor, texts: Tensor, classes: Tensor, scale: Tensor,
                       smoothing: float) -> tuple[Tensor, Tensor]:
    """The logits and the targets (R, N) of a chunk, image (R, E) and its classes (R,), with all texts (N, E)."""
    same = row_classes[:, None] == classes                                                             # (R, N)
    weight = (1 - smoothing) / same.sum(1, keepdim=True).to(scale.dtype)
    return product(image, texts.T, scale.dtype) * scale, same * weight + smoothing / len(texts)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, float32 also where a and b are bf16: rounded to bf16, exp(logit) errs in its second digit."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


CONTRASTIVE = {"itc": contrastive, "sdm": distribution_matching}       # by the value of --contrastive


def mean_where(values: Tensor, counts: Tensor, workers: Workers) -> Tensor:
    """This worker's share of `losses.mean_where` of all workers' values: the shares' mean is the joint mean."""
    count = workers.summed(counts.sum().float())
    return (values * counts).sum() * workers.count / count.clamp(min=1)
