"""How the work of a step, or of a search, is shared out: the interface that the method knows.

A worker has a rank and exchanges tensors with the others. `Workers` itself is one worker alone; run/machine.py has the
processes of torchrun and the threads of one process. Read next: diffusion/, or run/loop.py.
"""

import torch
from torch import Tensor


class Workers:
    """One of `count` workers, number `rank`; here the only one."""

    rank = 0
    count = 1

    def exchange(self, x: Tensor) -> list[Tensor]:
        """x of every worker, in the order of their ranks."""
        return [x]

    def gathered(self, x: Tensor) -> Tensor:
        """x (B, ...) of all workers, one below the other (count * B, ...), with gradients to this worker's own rows.

        Every worker computes the same joint loss, but differentiates its own rows only. So their gradient is multiplied
        by `count`: the mean over workers, which run/loop.py takes, is then their sum, the joint gradient. A parameter
        that is used after gathering, as the temperature, gets its whole gradient from each worker, and the mean keeps
        it.
        """
        if self.count == 1:
            return x
        parts = self.exchange(x.detach().contiguous())
        own = x.clone()
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * self.count)
        parts[self.rank] = own
        return torch.cat(parts)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of x over all workers; x itself must not be used afterwards."""
        total, *others = self.exchange(x)
        for other in others:
            total = total + other
        return total

    def own_rows(self, count: int) -> slice:
        """Where this worker's `count` rows stand in what `gathered` returns."""
        return slice(count * self.rank, count * (self.rank + 1))

    def own_batches(self, count: int, batch: int) -> list[int]:
        """Which of `count` rows this worker computes where all share them out by whole batches."""
        return [i for i in range(count) if i // batch % self.count == self.rank]
