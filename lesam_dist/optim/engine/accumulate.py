"""Second gradients added up over several perturbations of one step (m-sharpness)."""

from __future__ import annotations

import torch
from torch import Tensor

from lesam_dist.parallel.shards import local_shard


class GradientSum:
    """Takes gradients away from their parameters, and gives back the mean. Costs one gradient more in memory.

    Copies: a DDP bucket, which ``.grad`` may be a view of, is overwritten by the next backward.
    """

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._count = 0

    def take(self, params: list[Tensor]) -> None:
        """Add the current gradients; those that are None count as zero."""
        self._count += 1
        old: list[Tensor] = []
        new: list[Tensor] = []
        for p in params:
            if p.grad is None:
                continue
            if p in self._sums:
                old.append(local_shard(self._sums[p]))
                new.append(local_shard(p.grad))
            else:
                self._sums[p] = p.grad.clone()
        if old:
            torch._foreach_add_(old, new)

    def give_back(self, params: list[Tensor]) -> None:
        """``.grad`` becomes the mean of all gradients taken."""
        means = [local_shard(tensor) for tensor in self._sums.values()]
        if means:
            torch._foreach_div_(means, self._count)
        for p in params:
            if p not in self._sums:
                continue
            if p.grad is None:
                p.grad = self._sums[p]
            else:
                local_shard(p.grad).copy_(local_shard(self._sums[p]))  # a bucket's view stays one
