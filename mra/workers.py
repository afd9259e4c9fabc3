"""How the work of a training step, or of a search, is shared out over workers.

A worker is a process of torchrun, or one of the two threads that share a training step on the CPU. All workers have the
same weights. In a step each computes the loss and the gradients of its own samples, and the mean over workers is taken;
in a search each computes a part of the images. `Workers` stands for one worker alone. run/machine.py has `Processes`
and `Threads`, and run/loop.py trains with them. Read next: diffusion/, or run/loop.py.
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

        Every worker computes the same joint loss, but differentiates its own rows only. Their gradient is multiplied by
        `count`: the mean over workers is then the joint gradient. A parameter used after gathering, such as the
        temperature, has the joint gradient in each worker, and so in their mean.
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
