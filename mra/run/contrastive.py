"""The contrastive loss of losses.py for batches of any size, and for batches that a group shares.

The N x N logits exist only in tiles. The forward pass keeps their log-sum-exp in both directions, and the backward pass
computes each tile again; torch.compile fuses all but its product. Each member computes the rows of its own images.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from mra import losses
from mra.group import Group

PLAIN = 1024    # pairs up to which the whole matrix is computed: it is small, and tiles are slower
TILES = {"cpu": (1024, 512), "cuda": (4096, 8192)}     # (rows, columns) that fit the caches, or need few launches


def contrastive(image: Tensor, text: Tensor, temperature: Tensor | float, classes: Tensor, smoothing: float = 0.0,
                group: Group = Group()) -> Tensor:
    """`losses.contrastive` of all members' pairs, from this member's own, in memory of O(N E) and one tile; a scalar.

    image, text (B, E) of unit length, classes (B,), B the same for every member: N = members x B pairs. Each member
    returns the joint loss, and the mean of the members' gradients is the joint gradient.
    """
    device = image.device.type
    if len(image) * group.count <= PLAIN:
        return losses.contrastive(group.gathered(image), group.gathered(text), temperature,
                                  group.gathered(classes), smoothing)
    if torch.is_autocast_enabled(device):
        image, text = (x.to(torch.get_autocast_dtype(device)) for x in (image, text))
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = 1 / torch.as_tensor(temperature, dtype=wide, device=image.device)
    # a compiled model must not trace the tiles; as a decorator this would load the compiler (2 s) at every import
    tiled = torch.compiler.disable(Contrastive.apply)
    with torch.autocast(device, enabled=False):
        return tiled(image, text, scale, classes, smoothing, group)


def distribution_matching(image: Tensor, text: Tensor, temperature: Tensor | float, classes: Tensor,
                          smoothing: float = 0.0, group: Group = Group()) -> Tensor:
    """`losses.distribution_matching` of all members' pairs, from this member's own; it computes the whole matrix."""
    return losses.distribution_matching(group.gathered(image), group.gathered(text), temperature,
                                        group.gathered(classes), smoothing)


class Contrastive(torch.autograd.Function):
    """The loss in tiles. Saves features and N-vectors for the backward pass; gradients have the features' dtype.

    L = 1/N sum_i [(lse_j l_ij + lse_j l_ji) / 2 - sum_j target_ij l_ij],    l_ij = scale image_i . text_j
    which is losses.contrastive because the targets are symmetric and each row sums to one.
    """

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, classes: Tensor, smoothing: float,
                group: Group) -> Tensor:
        texts, classes = group.gathered(text), group.gathered(classes)
        own = slice(len(text) * group.rank, len(text) * (group.rank + 1))      # this member's rows of both
        ordered = classes.sort().values
        labels = torch.searchsorted(ordered, classes, out_int32=True)     # int32: compared in half the time   (N,)
        count = torch.searchsorted(ordered, classes, right=True) - labels                              # (N,)
        uniform = torch.full_like(count, smoothing / len(texts), dtype=scale.dtype)                    # (N,)
        matrix = image, labels[own], ((1 - smoothing) / count.to(uniform) + uniform)[own], texts, labels, uniform, scale
        lse_row, aligned = scale.new_full((len(image),), -torch.inf), scale.new_zeros(len(image))      # (B,), (B,)
        lse_column = scale.new_full((len(texts),), -torch.inf)                                         # (N,)
        for r, c, tile in tiles(*matrix):
            of_rows, of_columns, of_targets = compiled(sums)(*tile)
            torch.logaddexp(lse_row[r], of_rows, out=lse_row[r])
            torch.logaddexp(lse_column[c], of_columns, out=lse_column[c])
            aligned[r] += of_targets
        lse_column = group.gathered(lse_column[None]).logsumexp(0)
        ctx.group, ctx.own = group, own
        ctx.save_for_backward(lse_row, lse_column, *matrix)
        return group.summed(((lse_row + lse_column[own]) / 2 - aligned).sum()) / len(texts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        lse_row, lse_column, *matrix = ctx.saved_tensors
        image, _, _, texts, _, _, scale = matrix
        to_image, to_text = (torch.zeros_like(x, dtype=scale.dtype) for x in (image, texts))           # (B, E), (N, E)
        with torch.autocast(image.device.type, enabled=False):
            for r, c, tile in tiles(*matrix):
                slope = compiled(slopes)(tile, lse_row[r], lse_column[c])                                 # (R, C)
                to_image[r] += product(slope, texts[c], scale.dtype)
                to_text[c] += product(slope.T, image[r], scale.dtype)
        to_text = ctx.group.summed(to_text)[ctx.own]                        # (B, E)
        upstream = upstream * ctx.group.count / len(texts)
        to_scale = upstream * (image * to_image).sum()
        return to_image.mul_(upstream * scale), to_text.mul_(upstream * scale), to_scale, None, None, None


@cache
def compiled(function: Callable) -> Callable:
    """The function, compiled for all sizes. If compiling fails, that is said once, and it runs uncompiled."""
    fast = torch.compile(function, fullgraph=True, dynamic=True)

    def call(*tensors):
        try:
            return fast(*tensors) if call.possible else function(*tensors)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"torch.compile failed ({reason}): similarities are computed uncompiled.", flush=True)
            call.possible = False
            return function(*tensors)

    call.possible = True
    return call


def tiles(*matrix: Tensor) -> Iterator[tuple[slice, slice, tuple]]:
    """Rows, columns and inputs of each tile, cut from `matrix`, the inputs of `logits_and_targets` for all logits."""
    of_rows, of_columns, (height, width) = matrix[:3], matrix[3:6], TILES[matrix[0].device.type]
    for top in range(0, len(of_rows[0]), height):
        for left in range(0, len(of_columns[0]), width):
            r, c = slice(top, top + height), slice(left, left + width)
            yield r, c, (*(x[r] for x in of_rows), *(x[c] for x in of_columns), matrix[6])


def sums(*tile) -> tuple[Tensor, Tensor, Tensor]:
    """Of one tile's logits: log-sum-exp of its rows (R,), of its columns (C,), and sum_j target_ij l_ij (R,)."""
    logits, targets = logits_and_targets(*tile)
    return logits.logsumexp(1), logits.logsumexp(0), (targets * logits).sum(1)


def slopes(tile: tuple, lse_row: Tensor, lse_column: Tensor) -> Tensor:
    """N dL / dl_ij = (exp(l_ij - lse_row_i) + exp(l_ij - lse_column_j)) / 2 - target_ij, (R, C), in image's dtype."""
    logits, targets = logits_and_targets(*tile)
    chances = ((logits - lse_row[:, None]).exp() + (logits - lse_column).exp()) / 2
    return (chances - targets).to(tile[0].dtype)


def logits_and_targets(image: Tensor, row_labels: Tensor, shared: Tensor, text: Tensor, labels: Tensor,
                       uniform: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets (R, C) of image (R, E) and text (C, E): shared (R,) where labels agree, else uniform (C,)."""
    same = row_labels[:, None] == labels                                                               # (R, C)
    return product(image, text.T, scale.dtype) * scale, torch.where(same, shared[:, None], uniform)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, float32 also where a and b are bf16: rounded to bf16, exp(logit) errs in its second digit."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


CONTRASTIVE = {"itc": contrastive, "sdm": distribution_matching}       # by the value of --contrastive
