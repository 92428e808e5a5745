"""What a step does to the weights: save, perturb, restore, update. Rows and kernels behind it, no order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lesam_dist.optim import ops as operations
from lesam_dist.optim import reference
from lesam_dist.optim.base_update import Mixture, base_update
from lesam_dist.optim.ops import Backend, Ops
from lesam_dist.optim.reference import Radius
from lesam_dist.optim.rows import Gradients, RowCache, Rows
from lesam_dist.parallel import reduce_over_shards


class Perturbation:
    """The weights of one optimizer, as rows, and whether they are perturbed.

    Attributes:
        rows: parameters by device and mesh axes.
        ops: who does the maths of each of the rows.
        active: whether the weights are the perturbed ones.
        mixing: ``(a, b)`` of each param group in this step, see `SharpnessAware.mixture`.
        overflow: float32 0-d, 1 where a gradient of this step is not finite.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._cache = RowCache()
        self.rows: list[Rows] = []
        self.ops: list[Ops] = []
        self.active = False
        self._touched: list[Ops] = []
        self.mixing: list[Mixture] = []
        self.overflow = torch.zeros(())

    def refresh(self, groups: list[dict[str, Any]]) -> bool:
        """Bring the rows up to date with the param groups; returns whether they are new objects."""
        if not self._cache.refresh(groups):
            return False
        self.rows = self._cache.rows
        self.ops = [operations.select(self._backend, rows) for rows in self.rows]
        self.overflow = self.overflow.to(self.rows[0].device)
        return True

    def gradients(self) -> list[Gradients]:
        """The current gradients of each of the rows."""
        return [rows.gradients() for rows in self.rows]

    def perturb(self, grads: list[Gradients], radii: Sequence[Radius], mixing: list[Mixture], fresh: bool) -> Tensor:
        """Save the weights and perturb them by ``grads``.

        Args:
            grads: for each of the rows.
            radii, mixing: of each param group.
            fresh: the first perturbation of a step; later ones add to its kept gradients and its overflow flag.

        Returns:
            float64 (3,): grad_norm, the first group's rho, and 1 where the norm is not finite.
        """
        self.mixing = mixing
        self._keep_first(grads, fresh)
        sum_sq = self._sum([ops.sum_sq_first(g) for ops, g in zip(self.ops, grads, strict=True)])
        self.active, self._touched = True, []
        stats = []
        for rows, ops, g in zip(self.rows, self.ops, grads, strict=True):
            self._touched.append(ops)
            stats.append(ops.perturb(g, sum_sq.to(rows.device), radii))
        if fresh:
            self.overflow.copy_(stats[0][2])
        else:
            self.overflow.copy_(torch.maximum(self.overflow, stats[0][2]))
        return stats[0]

    def moved(self) -> Tensor:
        """||w' - w|| as stored, float64 0-d."""
        return self._sum([ops.moved_sq() for ops in self.ops]).sqrt()

    def check_second(self, grads: list[Gradients]) -> Tensor:
        """Raise the overflow flag where a second gradient is not finite; returns their global norm, float64 0-d."""
        sum_sq = self._sum([ops.sum_sq_second(g) for ops, g in zip(self.ops, grads, strict=True)])
        self.overflow.masked_fill_(~torch.isfinite(sum_sq), 1.0)
        return sum_sq.sqrt()

    def restore(self) -> None:
        """Give the weights back; harmless when they are not perturbed."""
        for ops in self._touched if self.active else ():
            ops.restore()
        self.active = False

    def update(self, base: Optimizer, grads: list[Gradients]) -> bool:
        """Restore and make the base optimizer's update in one launch, where a kernel does; returns whether."""
        update = base_update(base, self.mixing) if all(ops.fuses() for ops in self.ops) else None
        if update is None:
            return False
        for rows, ops, g in zip(self.rows, self.ops, grads, strict=True):
            ops.restore_and_update(update, g, self.overflow.to(rows.device))
        self.active = False
        return True

    def mix(self, grads: list[Gradients]) -> None:
        """Turn the second gradients into ``a * g_hat + b * g``, in place."""
        for rows, second in zip(self.rows, grads, strict=True):
            for g_hat, g, index in zip(second, rows.kept, rows.groups, strict=True):
                if g_hat is not None and self.mixing[index] != (1.0, 0.0):
                    reference.mix(g_hat, g, *self.mixing[index])

    def average_first(self, count: int) -> None:
        """Divide the kept first gradients, each the sum of ``count``."""
        for rows in self.rows:
            kept = [g for g in rows.kept if g is not None]
            if kept:
                torch._foreach_div_(kept, count)

    def push(self, base: Optimizer, radii: Sequence[Radius], mixing: list[Mixture]) -> None:
        """Copy scheduled values to where the kernels read them."""
        for ops in self.ops:
            ops.push(radii, base_update(base, mixing))

    def _keep_first(self, grads: list[Gradients], fresh: bool) -> None:
        """Save g for groups whose update needs it. Copied: a DDP bucket is overwritten by the second backward."""
        wanted = [b != 0 for _, b in self.mixing]
        if not any(wanted):
            return
        for rows, first in zip(self.rows, grads, strict=True):
            for row, g in enumerate(first):
                kept = rows.kept[row]
                if not wanted[rows.groups[row]] or (g is None and fresh):
                    rows.kept[row] = None
                elif g is not None and kept is None:
                    rows.kept[row] = g.clone()
                elif g is not None and kept is not None:
                    kept.copy_(g) if fresh else kept.add_(g)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        """One scalar over all rows and shards: a reduction for each set of mesh axes, none for whole tensors."""
        total = None
        for rows, part in zip(self.rows, parts, strict=True):
            reduced = reduce_over_shards(part, rows.axes)
            total = reduced if total is None else total + reduced.to(total.device)
        assert total is not None
        return total
