"""What a step does to the weights: save, perturb, restore, update. Rows and kernels behind it, no order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lesam_dist.optim.engine import backend as backends
from lesam_dist.optim.engine import reference
from lesam_dist.optim.engine.backend import Backend, Ops
from lesam_dist.optim.engine.base_update import Mixture, base_update
from lesam_dist.optim.engine.reference import Direction, Radius
from lesam_dist.optim.engine.rows import Gradients, RowCache, Rows
from lesam_dist.parallel.shards import reduce_over_shards


class Aim(NamedTuple):
    """Along what the weights are perturbed.

    Attributes:
        grads: for each of the rows; None moves along nothing.
        directions: what is made of them, of each param group; None leaves them as they are.
        emas: for each of the rows, what a direction with an ``ema_scale`` subtracts.
        sum_sq: squared norm of the whole direction, float64 0-d; None computes it.
    """

    grads: list[Gradients]
    directions: list[Direction] | None = None
    emas: list[Gradients | None] | None = None
    sum_sq: Tensor | None = None


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
        self.ops = [backends.select(self._backend, rows) for rows in self.rows]
        self.overflow = self.overflow.to(self.rows[0].device)
        return True

    def gradients(self) -> list[Gradients]:
        """The current gradients of each of the rows."""
        return [rows.gradients() for rows in self.rows]

    def of_perturbed(self, grads: list[Gradients]) -> list[Gradients]:
        """``grads`` without those of rows that are left out of norm and perturbation."""
        return [
            [g if on else None for g, on in zip(row_grads, rows.perturbed, strict=True)]
            for rows, row_grads in zip(self.rows, grads, strict=True)
        ]

    def perturb(self, aim: Aim, radii: Sequence[Radius], fresh: bool = True) -> Tensor:
        """Save the weights and perturb them.

        Args:
            aim: along what.
            radii: of each param group.
            fresh: the first perturbation of a step; later ones add to its overflow flag.

        Returns:
            float64 (3,): grad_norm, the first group's rho, and 1 where the norm is not finite.
        """
        emas = aim.emas or [None] * len(self.rows)
        directions = aim.directions or [Direction()] * len(radii)
        parts = [ops.aim(g, ema, directions) for ops, g, ema in zip(self.ops, aim.grads, emas, strict=True)]
        sum_sq = self._sum(parts) if aim.sum_sq is None else aim.sum_sq
        self.active, self._touched = True, []
        stats = []
        for rows, ops in zip(self.rows, self.ops, strict=True):
            self._touched.append(ops)
            stats.append(ops.perturb(sum_sq.to(rows.device), radii))
        torch.clear_autocast_cache()  # an autocast around the whole step keeps casts of the weights
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
        if not self.active:
            return
        for ops in self._touched:
            ops.restore()
        self.active = False
        torch.clear_autocast_cache()

    def update(self, base: Optimizer, grads: list[Gradients], factors: Tensor | None) -> bool:
        """Restore and make the base optimizer's update in one launch, where a kernel does; returns whether."""
        update = base_update(base, self.mixing) if all(ops.fuses() for ops in self.ops) else None
        if update is None:
            return False
        for rows, ops, g in zip(self.rows, self.ops, grads, strict=True):
            ops.restore_and_update(update, g, self.overflow.to(rows.device), factors)
        self.active = False
        torch.clear_autocast_cache()
        return True

    def mix(self, grads: list[Gradients], factors: Tensor | None) -> None:
        """Turn the second gradients into ``a * g_hat + b * g``, in place; ``factors`` (2,) multiply a and b."""
        for rows, second in zip(self.rows, grads, strict=True):
            for g_hat, g, index in zip(second, rows.kept, rows.groups, strict=True):
                a, b = self.mixing[index]
                if g_hat is not None and factors is not None:
                    reference.mix(g_hat, g, a * factors[0].to(g_hat.device), b * factors[1].to(g_hat.device))
                elif g_hat is not None and (a, b) != (1.0, 0.0):
                    reference.mix(g_hat, g, a, b)

    def dot_kept(self, grads: list[Gradients]) -> Tensor:
        """``(g . g_hat, ||g||^2, ||g_hat||^2)`` over the rows that have both gradients, float64 (3,); one reduction."""
        return self._sum([ops.dots_kept(g_hat) for ops, g_hat in zip(self.ops, grads, strict=True)])

    def dot(self, first: list[Gradients], second: list[Gradients]) -> Tensor:
        """Sum of the products of two lists over all rows and shards, float64 0-d; a missing tensor counts as zero."""
        parts = []
        for rows, a, b in zip(self.rows, first, second, strict=True):
            pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
            if pairs:
                parts.append(reference.dot([x for x, _ in pairs], [y for _, y in pairs]))
            else:
                parts.append(torch.zeros((), dtype=torch.float64, device=rows.device))
        return self._sum(parts)

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

    def keep_first(self, grads: list[Gradients], mixing: list[Mixture], fresh: bool = True) -> None:
        """Choose the mixture of each group, and save g for those that need it.

        Copied: a DDP bucket is overwritten by the second backward.
        """
        self.mixing = mixing
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
