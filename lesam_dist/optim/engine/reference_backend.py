"""`Ops` in plain torch, list by list, and what both backends share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesam_dist.optim.engine import reference
from lesam_dist.optim.engine.reference import Direction, Radius
from lesam_dist.optim.engine.rows import Gradients, Rows


class ReferenceOps:
    """Plain torch, list by list."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._touched: list[int] = []
        self._along: Gradients = []
        self._grads: Gradients = []

    def sum_sq_first(
        self, grads: Gradients, ema: Gradients | None, directions: Sequence[Direction], known: Tensor | None = None
    ) -> Tensor:
        rows = self._rows
        require_dense([g for g in grads if g is not None])
        self._along, self._grads, scaled = [], grads, []
        for row, g in enumerate(grads):
            if g is None or not rows.perturbed[row]:
                self._along.append(None)
                continue
            average = ema[row] if ema else None
            scaled_g, along = reference.directed(rows.shards[row], g, average, directions[rows.groups[row]])
            scaled.append(scaled_g)
            self._along.append(along)
        return self._sum_sq(scaled) if known is None else known

    def stay(self) -> None:
        self._along, self._grads = [], []

    def sum_sq_second(self, grads: Gradients) -> Tensor:
        return self._sum_sq(grads)

    def perturb(
        self,
        sum_sq: Tensor,
        radii: Sequence[Radius],
        keep: bool,
        overflow: Tensor | None,
        fresh: bool,
        times: Tensor | None,
    ) -> Tensor:
        rows = self._rows
        if times is not None:
            factors = times.tolist()
            radii = [Radius(*(value * factor for value, factor in zip(r, factors, strict=True))) for r in radii]
        if keep:
            pairs = [(k, g) for k, g in zip(rows.kept, self._grads, strict=True) if k is not None and g is not None]
            if pairs:
                torch._foreach_copy_([k for k, _ in pairs], [g for _, g in pairs])
        by_radius: dict[Radius, list[int]] = {}
        for row in allocate_copies(rows, self._along):
            by_radius.setdefault(radii[rows.groups[row]], []).append(row)
        stats = None
        for radius, members in by_radius.items():
            shards, along = _take(rows.shards, members), _take(self._along, members)
            result = reference.perturb(shards, along, _take(rows.copies, members), sum_sq, radius)
            self._touched += members
            stats = result if stats is None else stats
        self._along, self._grads = [], []  # the second pass must not pay for them
        stats = torch.zeros(3, dtype=torch.float64, device=rows.device) if stats is None else stats
        if overflow is not None:
            overflow.copy_(stats[2] if fresh else torch.maximum(overflow, stats[2]))
        return stats

    def restore(self) -> None:
        rows = self._rows
        reference.restore(_take(rows.shards, self._touched), _take(rows.copies, self._touched))
        self._touched = []

    def dots_kept(self, grads: Gradients) -> Tensor:
        pairs = zip(self._rows.kept, grads, strict=True)
        both = [(g, g_hat) for g, g_hat in pairs if g is not None and g_hat is not None]
        if not both:
            return torch.zeros(3, dtype=torch.float64, device=self._rows.device)
        g, g_hat = [pair[0] for pair in both], [pair[1] for pair in both]
        return torch.stack([reference.dot(g, g_hat), reference.sum_sq(g), reference.sum_sq(g_hat)])

    def moved_sq(self) -> Tensor:
        return moved_sq(self._rows, self._touched)

    def fuses(self) -> bool:
        return False

    def restore_and_update(self, *_: object) -> None:
        raise NotImplementedError("the reference restores, then the base optimizer steps by itself")

    def push(self, *_: object) -> None:
        pass

    def _sum_sq(self, grads: Sequence[Tensor | None]) -> Tensor:
        present = [g for g in grads if g is not None]
        require_dense(present)
        if not present:
            return torch.zeros((), dtype=torch.float64, device=self._rows.device)
        return reference.sum_sq(present)


def allocate_copies(rows: Rows, grads: Gradients) -> list[int]:
    """The rows to perturb: those with a first gradient, in a perturbed group. Gives each its buffer for the weights."""
    touched = [row for row, g in enumerate(grads) if g is not None and rows.perturbed[row]]
    for row in touched:
        if rows.copies[row] is None:
            rows.copies[row] = torch.empty_like(rows.shards[row])
    return touched


def moved_sq(rows: Rows, touched: Sequence[int]) -> Tensor:
    """Sum of squares of w' - w over the rows ``touched``, in float64: the difference is exact."""
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for w, copy in zip(_take(rows.shards, touched), _take(rows.copies, touched), strict=True):
        total += reference.sum_sq([w.detach().double() - copy.double()])
    return total


def require_dense(grads: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a sparse gradient."""
    for g in grads:
        if g.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of shape {tuple(g.shape)} is {g.layout}; sharpness-aware optimizers need dense gradients "
                "(nn.Embedding: sparse=False)."
            )


def _take(column: Sequence[Tensor | None], rows: Sequence[int]) -> list[Tensor]:
    return [tensor for row in rows if (tensor := column[row]) is not None]
