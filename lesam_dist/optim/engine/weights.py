"""What a step does to the weights: save, climb, restore, update. Rows and kernels behind it, no order of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lesam_dist.optim.engine import reference
from lesam_dist.optim.engine.backend import Ops, select
from lesam_dist.optim.engine.base_update import Mixture, base_update
from lesam_dist.optim.engine.coefficients import ZERO, Coefficient, Factors, lower, times
from lesam_dist.optim.engine.early_sums import Arrivals, EarlySums
from lesam_dist.optim.engine.loss_scale import LossScale
from lesam_dist.optim.engine.options import Backend
from lesam_dist.optim.engine.reference import Direction, Radius
from lesam_dist.optim.engine.rows import RowCache, Rows
from lesam_dist.optim.engine.vectors import Ascent, Column, Update, Vector, add_scaled
from lesam_dist.parallel.shards import local_shard, reduce_over_shards


class Weights:
    """The weights of one optimizer, as rows, and whether they are perturbed.

    Attributes:
        groups: the optimizer's param groups.
        rows: parameters by device and mesh axes.
        ops: who does the maths of each of the rows.
        active: whether the weights are the perturbed ones, or a step without perturbation has begun.
        early: sums taken during backward, where ``arrivals`` says who tells of the gradients.
        loss_scale: what the gradients that are there now are multiplied by, if anything.
    """

    def __init__(self, backend: Backend, arrivals: Arrivals | None = None) -> None:
        self._backend = backend
        self._arrivals = arrivals
        self.early: EarlySums | None = None
        self._cache = RowCache()
        self.groups: list[dict[str, Any]] = []
        self.rows: list[Rows] = []
        self.ops: list[Ops] = []
        self.active = False
        self.loss_scale: LossScale | None = None
        self._overflow = torch.zeros(())
        self._unchecked: Tensor | None = None  # sum of squares of the second gradients, not looked at yet
        self._unkept: Column | None = None  # first gradients that are to be kept, not copied yet
        self._still = torch.zeros(3, dtype=torch.float64)  # what is told of a step that climbs nowhere
        self._unsettled = True  # the model may not have run since the rows were made
        self._touched: list[Ops] = []
        self._signs: Sequence[float] = []  # of each group's last climb: along a vector, or against it
        self._pair: tuple[Column, Column] | None = None  # g, where it is kept, and g_hat

    def refresh(self, groups: list[dict[str, Any]]) -> bool:
        """Bring the rows up to date with the param groups; returns whether they are new objects."""
        self.groups = groups
        if not self._cache.refresh(groups):
            return False
        self.rows = self._cache.rows
        self.ops = [select(self._backend, rows) for rows in self.rows]
        self._overflow = self._overflow.to(self.rows[0].device)
        self._still = torch.zeros(3, dtype=torch.float64, device=self.rows[0].device)
        self._unsettled = True
        if self._arrivals is not None:
            self.early = EarlySums(self.rows, self._backend, self._arrivals)
        return True

    @property
    def overflow(self) -> Tensor:
        """float32 0-d, 1 where a gradient of this step is not finite."""
        if self._unchecked is not None:
            self._overflow.masked_fill_(~torch.isfinite(self._unchecked), 1.0)
            self._unchecked = None
        return self._overflow

    def gradients(self) -> Column:
        """The current gradients."""
        column = Column([rows.gradients() for rows in self.rows], scale=self.loss_scale)
        column.early = self.early
        return column

    def of_perturbed(self, column: Column) -> Column:
        """``column`` without the parameters that are left out of norm and perturbation; itself where none is."""
        if all(all(rows.perturbed) for rows in self.rows):
            return column
        if column.perturbed is None:
            pairs = zip(self.rows, column.tensors, strict=True)
            column.perturbed = Column(
                [[t if on else None for t, on in zip(tensors, rows.perturbed, strict=True)] for rows, tensors in pairs],
                column.is_blank,
            )
        return column.perturbed

    # ---- climb ---------------------------------------------------------------------------------------------------

    def climb(self, ascent: Ascent, radii: Sequence[Radius], fresh: bool = True) -> Tensor:
        """Save the weights and perturb them.

        Args:
            ascent: along what.
            radii: of each param group.
            fresh: the first perturbation of a step; later ones add to its overflow flag.

        Returns:
            float64 (3,): grad_norm, the first group's rho, and 1 where the norm is not finite.
        """
        column, average, directions, signs = self._lower(ascent)
        averages = [None] * len(self.rows) if average is None else average.tensors
        known: Sequence[Tensor | None] = [None] * len(self.rows)
        if average is not None or ascent.norm_sq is not None:
            column.unscale()
        if column.early is not None and all(direction == Direction() for direction in directions):
            known = column.early.take(column.in_memory, perturbed_only=True)
        scale = column.scale
        zipped = zip(self.ops, column.in_memory, averages, known, strict=True)
        parts = [ops.sum_sq_first(g, ema, directions, own) for ops, g, ema, own in zipped]
        sum_sq = self._sum(parts) if ascent.norm_sq is None else ascent.norm_sq
        signed = _signed(radii, signs)
        self._signs = signs
        self.active, self._touched = True, []
        keep = self._unkept is not None and column is self._unkept
        if self._unkept is not None and not keep:
            self._copy_first(self._unkept)
        self._unkept = self._unchecked = None
        stats: list[Tensor] = []
        for rows, ops in zip(self.rows, self.ops, strict=True):
            self._touched.append(ops)
            own = None if stats else self._overflow  # which is on the device of the first
            of_radius = None if scale is None else scale.of_radius.to(rows.device)
            stats.append(ops.perturb(sum_sq.to(rows.device), signed, keep, own, fresh, of_radius))
        torch.clear_autocast_cache()  # an autocast around the whole step keeps casts of the weights
        if scale is not None:
            stats[0][0].mul_(scale.inverse)
        return stats[0]

    def _lower(self, ascent: Ascent) -> tuple[Column, Column | None, list[Direction], Sequence[float]]:
        """A column, an average that is taken off it, what each group makes of both, and a sign for each group."""
        groups = len(self.groups)
        plain, ahead = ascent.metric or [Direction()] * groups, [1.0] * groups
        terms = ascent.along.terms
        if ascent.norm_sq is None and all(c.is_number for c, _ in terms):
            if len(terms) == 1 and len({abs(number) for number in terms[0][0].shift}) == 1:
                numbers = [float(terms[0][0].of(group)) for group in range(groups)]
                if numbers[0] != 0.0:
                    return terms[0][1], None, plain, numbers  # as far as along the column itself
            if len(terms) == 2 and terms[0][0].is_one and ascent.metric is None and terms[1][1].covers(terms[0][1]):
                scales = [Direction(ema_scale=-float(terms[1][0].of(group))) for group in range(groups)]
                return terms[0][1], terms[1][1], scales, ahead
        return ascent.along.column(), None, plain, ahead

    def stay(self, fresh: bool = True) -> Tensor:
        """Begin a step that moves no weights before its update; returns what `climb` does."""
        for ops in self.ops:
            ops.stay()
        self.active, self._touched = True, []
        self._unchecked = None
        if fresh:
            self._overflow.zero_()
        return self._still

    def moved(self) -> Tensor:
        """||w' - w|| as stored, float64 0-d."""
        return self._sum([ops.moved_sq() for ops in self.ops]).sqrt()

    def keep_first(self, g: Column, wanted: Sequence[bool], fresh: bool = True) -> Column:
        """Save g for the groups that need it, by the time that `climb` returns; returns what it is saved in.

        Copied: a DDP bucket is overwritten by the second backward. A climb along g itself copies it on its way.
        """
        for rows, first in zip(self.rows, g.tensors, strict=True):
            for row, tensor in enumerate(first):
                kept = rows.kept[row]
                if not wanted[rows.groups[row]] or (tensor is None and fresh):
                    rows.kept[row] = None
                elif tensor is not None and kept is None:
                    rows.kept[row] = torch.empty_like(tensor) if fresh else tensor.clone()
                elif tensor is not None and kept is not None and not fresh:
                    kept.add_(tensor)
        self._unkept = g if fresh else None
        return Column([rows.kept for rows in self.rows])

    def _copy_first(self, g: Column) -> None:
        pairs = [
            (kept, tensor)
            for rows, first in zip(self.rows, g.tensors, strict=True)
            for kept, tensor in zip(rows.kept, first, strict=True)
            if kept is not None and tensor is not None
        ]
        if pairs:
            torch._foreach_copy_([kept for kept, _ in pairs], [tensor for _, tensor in pairs])

    def average_first(self, count: int) -> None:
        """Divide the kept first gradients, each the sum of ``count``."""
        for rows in self.rows:
            kept = [g for g in rows.kept if g is not None]
            if kept:
                torch._foreach_div_(kept, count)

    def write(self, vector: Vector, grads: Column) -> None:
        """Let the tensors of ``grads`` hold the vector, in place; what is added to them themselves needs no other."""
        if not (vector.terms and vector.terms[0][0].is_one and vector.terms[0][1] is grads):
            self._replace(grads, vector.column())
            return
        if len(vector.terms) == 1:
            return
        for row, (rows, tensors) in enumerate(zip(self.rows, grads.tensors, strict=True)):
            for index, (g, group) in enumerate(zip(tensors, rows.groups, strict=True)):
                for coefficient, column in vector.terms[1:]:
                    other = column.tensors[row][index]
                    if g is not None and other is not None:
                        add_scaled(g, other, coefficient.of(group), in_place=True)

    def _replace(self, grads: Column, values: Column) -> None:
        for tensors, made in zip(grads.tensors, values.tensors, strict=True):
            for tensor, value in zip(tensors, made, strict=True):
                if tensor is not None:
                    tensor.zero_() if value is None else tensor.copy_(value)

    # ---- descend -------------------------------------------------------------------------------------------------

    def check_second(self, g_hat: Column) -> Tensor:
        """Raise the overflow flag where a second gradient is not finite.

        The flag goes up when somebody asks for it, or in the kernel that makes the update. Returns the sum of squares
        of what is in memory, float64 0-d.
        """
        if g_hat.early is not None:
            parts = g_hat.early.take(g_hat.in_memory)
        else:
            parts = [ops.sum_sq_second(g) for ops, g in zip(self.ops, g_hat.in_memory, strict=True)]
        self._unchecked = sum_sq = self._sum(parts)
        g_hat.sum_sq = sum_sq if g_hat.scale is None else None
        return sum_sq

    def restore(self) -> None:
        """Give the weights back; harmless when they are not perturbed."""
        self._unkept = None
        if not self.active:
            return
        for ops in self._touched:
            ops.restore()
        self._settle()
        self.active, self._pair = False, None
        torch.clear_autocast_cache()

    def _settle(self) -> None:
        """Bring the exact weights to where the model now keeps its shards.

        Up to torch 2.9 the first forward of FSDP2, also after a checkpoint was loaded, moves shards that it must pad.
        Where the weights were perturbed before it, the copies belong to the old place.
        """
        if not self._unsettled:
            return
        self._unsettled = False
        for rows in self.rows:
            if not rows.dtensors:
                continue
            for p, shard in zip(rows.params, rows.shards, strict=True):
                now = local_shard(p).detach()
                if now.data_ptr() != shard.data_ptr():
                    now.copy_(shard)

    def pair(self, g: Column, g_hat: Column) -> None:
        """Let products of these two be made by the launch that makes all three of them."""
        self._pair = (g, g_hat)

    def updates(self, base: Optimizer) -> bool:
        """Whether a kernel makes the base optimizer's update."""
        neutral = [(1.0, 0.0)] * len(self.groups)
        return all(ops.fuses() for ops in self.ops) and base_update(base, neutral) is not None

    def update(self, base: Optimizer, update: Update, g: Column, g_hat: Column, skipped: Tensor) -> bool:
        """Restore and make the base optimizer's update in one launch, where a kernel does; returns whether.

        It then also adds 1 to ``skipped`` (float32 0-d) where a gradient was not finite. Where not, the weights are
        restored and ``.grad`` is what the base optimizer must step with.
        """
        mixing, factors = self._mixture(update.along, g, g_hat)
        fused = base_update(base, mixing) if all(ops.fuses() for ops in self.ops) else None
        if fused is None:
            self.restore()
            self._mix(g_hat, mixing, factors, update.beside)
            return False
        if scale := g_hat.scale:
            of_a, of_b = factors
            factors = (scale.inverse if of_a is None else of_a * scale.inverse.to(of_a.device), of_b)
        for index, (rows, ops, second) in enumerate(zip(self.rows, self.ops, g_hat.in_memory, strict=True)):
            # The first, on whose device the flag is, raises it for the others.
            news = (self._unchecked, skipped) if index == 0 else (None, None)
            ops.restore_and_update(fused, second, self._overflow.to(rows.device), factors, *news)
        self._unchecked = None
        self._settle()
        self.active, self._pair = False, None
        torch.clear_autocast_cache()
        if update.beside is not None:
            self._keep_beside(update.beside, g_hat)
        return True

    def _mixture(self, along: Vector, g: Column, g_hat: Column) -> tuple[list[Mixture], Factors]:
        """``(a, b)`` of each param group in ``a * g_hat + b * g``, and their factors, see `lower`."""
        coefficients: dict[int, Coefficient] = {id(column): c for c, column in along.terms}
        if coefficients.keys() <= {id(g), id(g_hat)}:
            return lower(coefficients.get(id(g_hat), ZERO), coefficients.get(id(g), ZERO), len(self.groups))
        self._replace(g_hat, along.column())
        return [(1.0, 0.0)] * len(self.groups), (None, None)

    def _mix(self, g_hat: Column, mixing: list[Mixture], factors: Factors, beside: Vector | None) -> None:
        """Turn the second gradients into ``a * g_hat + b * g``, in place, and g into what goes beside."""
        is_scaled = any(f is not None for f in factors)
        pairs = [[times(*of, group) for of in zip(ab, factors, strict=True)] for group, ab in enumerate(mixing)]
        for row, (rows, second) in enumerate(zip(self.rows, g_hat.tensors, strict=True)):
            for index, (tensor, group) in enumerate(zip(second, rows.groups, strict=True)):
                own = None if beside is None or tensor is None else beside.of(row, index)
                g = rows.kept[index]
                if tensor is not None and (is_scaled or mixing[group] != (1.0, 0.0)):
                    a, b = (x.to(tensor.device) if isinstance(x, Tensor) else x for x in pairs[group])
                    reference.mix(tensor, g, a, b)
                if beside is not None:
                    rows.kept[index] = own

    def _keep_beside(self, beside: Vector, g_hat: Column) -> None:
        """Put what goes beside in the place of g, which is not needed any more; nothing where there is no update."""
        for row, (rows, second) in enumerate(zip(self.rows, g_hat.tensors, strict=True)):
            for index, tensor in enumerate(second):
                rows.kept[index] = None if tensor is None else beside.of(row, index)

    def descend_beside(self) -> None:
        """``w <- w - lr * beside``, unless a gradient was not finite; after the base optimizer's step."""
        finite = self.overflow == 0
        for rows in self.rows:
            for w, beside, index in zip(rows.shards, rows.kept, rows.groups, strict=True):
                if beside is not None:
                    group = self.groups[index]
                    step = beside * (-group["lr"] if group.get("maximize") else group["lr"])
                    w.sub_(torch.where(finite.to(w.device), step, 0.0))

    def push(self, base: Optimizer, radii: Sequence[Radius], update: Update, g: Column, g_hat: Column) -> None:
        """Copy scheduled values to where the kernels read them."""
        mixing, _ = self._mixture(update.along, g, g_hat)
        signed = _signed(radii, self._signs or [1.0] * len(radii))
        for ops in self.ops:
            ops.push(signed, base_update(base, mixing))
        if self.early is not None:
            self.early.push(signed)

    # ---- products ------------------------------------------------------------------------------------------------

    def dot(self, first: Column, second: Column) -> Tensor:
        """Sum of the products over all rows and shards, float64 0-d; a missing tensor counts as zero."""
        if first.is_blank or second.is_blank:
            return torch.zeros((), dtype=torch.float64, device=self.overflow.device)
        if first is second:
            if first.sum_sq is None:
                if self._pair and first in self._pair:
                    self._dot_pair()
                if first.sum_sq is None:
                    first.sum_sq = self._dot(first, first)
            return first.sum_sq
        if self._pair and {first, second} == set(self._pair):
            return self._dot_pair()
        return self._dot(first, second)

    def _dot_pair(self) -> Tensor:
        """The product of g and g_hat; their squared norms come with it, where both have the same parameters."""
        assert self._pair is not None
        g, g_hat = self._pair
        product, sum_sq, sum_sq_hat = self._sum(
            [ops.dots_kept(second) for ops, second in zip(self.ops, g_hat.tensors, strict=True)]
        ).unbind()
        if g.presence() == g_hat.presence():
            g.sum_sq = sum_sq
            g_hat.sum_sq = sum_sq_hat if g_hat.sum_sq is None else g_hat.sum_sq
        return product

    def _dot(self, first: Column, second: Column) -> Tensor:
        parts = []
        for rows, a, b in zip(self.rows, first.tensors, second.tensors, strict=True):
            pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
            if pairs:
                parts.append(reference.dot([x for x, _ in pairs], [y for _, y in pairs]))
            else:
                parts.append(torch.zeros((), dtype=torch.float64, device=rows.device))
        return self._sum(parts)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        """One scalar over all rows and shards: a reduction for each set of mesh axes, none for whole tensors."""
        total = None
        for rows, part in zip(self.rows, parts, strict=True):
            reduced = reduce_over_shards(part, rows.axes)
            total = reduced if total is None else total + reduced.to(total.device)
        assert total is not None
        return total


def _signed(radii: Sequence[Radius], signs: Sequence[float]) -> list[Radius]:
    return [r if sign > 0 else r._replace(sigma=-r.sigma) for r, sign in zip(radii, signs, strict=True)]
