"""A group of workers that share a step or a search: torchrun's processes, or, for a step on the CPU, two threads.

A *member* is one worker. All members have the same weights. In a step each computes the loss and the gradients of its
own samples, and the mean over members is taken; in a search each computes a part of the images. A `Group` is the group
as one member sees it; this class is a group of one, and run/machine.py has the others. Read next: layers.py.
"""

import torch
from torch import Tensor


class Group:
    """A group of `count` members, seen by member number `rank`; here the only one."""

    rank = 0
    count = 1

    def exchange(self, x: Tensor) -> list[Tensor]:
        """x of every member, in the order of their ranks."""
        return [x]

    def gathered(self, x: Tensor) -> Tensor:
        """x (B, ...) of all members, one below the other (count * B, ...), with gradients to this member's own rows.

        Every member computes the same joint loss, but differentiates its own rows only. Their gradient is multiplied by
        `count`: the mean over members is then the joint gradient. A parameter used after gathering, such as the
        temperature, has the joint gradient in each member, and so in their mean.
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
        """The sum of x over all members; x itself must not be used afterwards."""
        total, *others = self.exchange(x)
        for other in others:
            total = total + other
        return total

    def mean_where(self, values: Tensor, exists: Tensor) -> Tensor:
        """This member's part of the masked mean over all members: the mean of their parts. 0 where nothing exists."""
        total = self.summed(exists.sum().float())
        return (values * exists).sum() * self.count / total.clamp(min=1)

    def own_rows(self, rows: int, batch: int) -> list[int]:
        """The rows, of `rows`, that this member computes, if whole batches are dealt out in turn."""
        return [i for i in range(rows) if i // batch % self.count == self.rank]
