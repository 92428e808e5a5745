"""Vectors over all parameters, in which a method's rule is written: ``g_hat - alpha * (g - share * g_hat)``.

A vector is a sum of columns with coefficients, and nothing is computed before somebody needs it: the engine hands the
coefficients of g and g_hat to the fused update, a dot product is one launch and one all-reduce, and what no kernel
knows is made of plain torch, tensor by tensor. Shards, dtypes and devices stay in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lesam_dist.optim.engine.coefficients import ONE, Coefficient
from lesam_dist.optim.engine.rows import Gradients

if TYPE_CHECKING:
    from lesam_dist.optim.engine.early_sums import EarlySums
    from lesam_dist.optim.engine.loss_scale import LossScale
    from lesam_dist.optim.engine.reference import Direction
    from lesam_dist.optim.engine.weights import Weights

Factor = float | Tensor | Coefficient


class Column:
    """One tensor or None for each parameter, row by row, and what is known of them.

    Attributes:
        in_memory: the tensors, parallel to `Weights.rows`, as they are: gradients may be multiplied by a loss scale.
        sum_sq: sum of squares over all rows and shards, float64 0-d; None where nobody has computed it.
        perturbed: what `Vector.perturbed` made of it.
        is_blank: it stands for one that is not there yet; its products are zero and cost nothing.
        early: where sums of squares of gradients, as these are, may have been taken during backward.
    """

    early: EarlySums | None = None

    def __init__(self, tensors: list[Gradients], is_blank: bool = False, scale: LossScale | None = None) -> None:
        self.in_memory = tensors
        self._scale = scale
        self.sum_sq: Tensor | None = None
        self.perturbed: Column | None = None
        self.is_blank = is_blank

    @property
    def scale(self) -> LossScale | None:
        """What `in_memory` is multiplied by; None where it is not."""
        return self._scale if self._scale is not None and self._scale.is_on else None

    @property
    def tensors(self) -> list[Gradients]:
        """The tensors, off which a loss scale is taken now, in place, if it is still on."""
        self.unscale()
        return self.in_memory

    def unscale(self) -> None:
        """Take the loss scale off the tensors, in place."""
        if scale := self.scale:
            scale.take_off(t for row in self.in_memory for t in row if t is not None)

    def presence(self) -> list[bool]:
        """For each parameter whether there is a tensor."""
        return [tensor is not None for tensors in self.in_memory for tensor in tensors]

    def covers(self, other: Column) -> bool:
        """Whether there is a tensor wherever the other column has one."""
        return all(has or not needed for has, needed in zip(self.presence(), other.presence(), strict=True))

    def length(self, sum_sq: Tensor) -> Tensor:
        """The norm of which ``sum_sq`` is the square in memory."""
        norm = sum_sq.sqrt()
        return norm if self.scale is None else norm * self.scale.inverse


class NotKept(Column):
    """The first gradient after a step that did not keep it."""

    def __init__(self) -> None:
        super().__init__([])

    @property
    def tensors(self) -> list[Gradients]:
        raise RuntimeError(
            "the rule uses the first gradient after the second pass, but kept no copy of it: let `needs_first` return "
            "True for the param groups where it does."
        )


class Vector:
    """A vector over all parameters; ``+``, ``-``, and ``*`` and ``/`` by a number or a 0-d tensor make new ones.

    A parameter without gradient counts as zero.
    """

    def __init__(self, weights: Weights, terms: Sequence[tuple[Coefficient, Column]]) -> None:
        self._weights = weights
        self._terms = list(terms)

    @property
    def terms(self) -> list[tuple[Coefficient, Column]]:
        """The columns and their coefficients, each column once."""
        return self._terms

    def __add__(self, other: Vector) -> Vector:
        sums = {id(column): (coefficient, column) for coefficient, column in self._terms}
        for coefficient, column in other._terms:
            before = sums.get(id(column))
            sums[id(column)] = (coefficient if before is None else before[0] + coefficient, column)
        return Vector(self._weights, list(sums.values()))

    def __neg__(self) -> Vector:
        return self * -1.0

    def __sub__(self, other: Vector) -> Vector:
        return self + -other

    def __mul__(self, factor: Factor) -> Vector:
        return Vector(self._weights, [(coefficient * factor, column) for coefficient, column in self._terms])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Vector:
        return self * (1.0 / divisor)

    def dot(self, other: Vector) -> Tensor:
        """The inner product over all parameters and shards, float64 0-d."""
        if len(self._terms) == len(other._terms) == 1:  # no tensors need be made of multiples
            (own, column), (its, other_column) = self._terms[0], other._terms[0]
            if own.is_scalar and its.is_scalar:
                product = self._weights.dot(column, other_column)
                return product if own.is_one and its.is_one else product * (own * its).of(0)
        return self._weights.dot(self.column(), other.column())

    def norm_sq(self) -> Tensor:
        """The inner product with itself."""
        return self.dot(self)

    def norm(self) -> Tensor:
        """The Euclidean norm, float64 0-d."""
        return self.norm_sq().sqrt()

    @property
    def perturbed(self) -> Vector:
        """The part that takes part in norm and perturbation; zero in groups with ``perturb=False``."""
        return Vector(self._weights, [(c, self._weights.of_perturbed(column)) for c, column in self._terms])

    def only(self, chosen: Sequence[bool]) -> Vector:
        """Zero but for the chosen parameters, in the order of the param groups."""
        index = {p: i for i, p in enumerate(p for group in self._weights.groups for p in group["params"])}
        on = [[chosen[index[p]] for p in rows.params] for rows in self._weights.rows]
        return self._made([_where(row, flags) for row, flags in zip(self.column().tensors, on, strict=True)])

    def map(self, function: Callable[..., Tensor], *scalars: Coefficient) -> Vector:
        """``function(tensor, *numbers)`` of every parameter's tensor, with the numbers of its param group."""
        made: list[Gradients] = []
        for rows, tensors in zip(self._weights.rows, self.column().tensors, strict=True):
            numbers = [[scalar.of(group) for scalar in scalars] for group in rows.groups]
            pairs = zip(tensors, numbers, strict=True)
            made.append([None if tensor is None else function(tensor, *own) for tensor, own in pairs])
        return self._made(made)

    def where_finite(self, otherwise: Vector) -> Vector:
        """Itself where its norm is finite, else the other vector; nobody waits for the device."""
        finite = torch.isfinite(self.norm_sq())
        made: list[Gradients] = []
        for own, others in zip(self.column().tensors, otherwise.column().tensors, strict=True):
            pairs = zip(own, others, strict=True)
            made.append([None if v is None else _choose(finite, v, other) for v, other in pairs])
        return self._made(made)

    def copy(self) -> Vector:
        """The same numbers in tensors of its own, which no later pass overwrites."""
        return self._made([[None if t is None else t.clone() for t in row] for row in self.column().tensors])

    def column(self) -> Column:
        """The vector's own tensors; a sum is computed the first time, and kept."""
        if len(self._terms) != 1 or not self._terms[0][0].is_one:
            sizes = enumerate(len(rows.params) for rows in self._weights.rows)
            self._terms = self._made([[self.of(row, i) for i in range(size)] for row, size in sizes]).terms
        return self._terms[0][1]

    def of(self, row: int, index: int) -> Tensor | None:
        """The tensor of one parameter; nothing else is computed."""
        group = self._weights.rows[row].groups[index]
        return combine([(c.of(group), column.tensors[row][index]) for c, column in self._terms])

    def _made(self, tensors: list[Gradients]) -> Vector:
        is_blank = any(column.is_blank for _, column in self._terms)
        return Vector(self._weights, [(ONE, Column(tensors, is_blank))])


class Ascent(NamedTuple):
    """Where to climb, where that is more than along a vector by its own length: ``w + rho * along / sqrt(norm_sq)``.

    Attributes:
        along: the direction. With a metric, the gradient alone.
        metric: of each param group, for ``along = T^2 g`` of length ``||T g||``.
        norm_sq: squared length of ``along`` in the method's own metric, float64 0-d.
    """

    along: Vector
    metric: list[Direction] | None = None
    norm_sq: Tensor | None = None


class Update(NamedTuple):
    """What to descend along, where a part of it is kept from the base optimizer: its step is made with ``along``, and
    then ``w <- w - lr * beside``, with the learning rate of each param group."""

    along: Vector
    beside: Vector | None = None


def combine(terms: Sequence[tuple[float | Tensor, Tensor | None]]) -> Tensor | None:
    """The sum of tensors with coefficients, as a new tensor, or the only one itself where its coefficient is 1."""
    total: Tensor | None = None
    is_own = False
    for coefficient, tensor in terms:
        if tensor is None or (isinstance(coefficient, float) and coefficient == 0.0):
            continue
        if total is None:
            is_own = not (isinstance(coefficient, float) and coefficient == 1.0)
            total = tensor * _like(coefficient, tensor) if is_own else tensor
        else:
            total = add_scaled(total, tensor, coefficient, in_place=is_own)
            is_own = True
    return total


def add_scaled(total: Tensor, tensor: Tensor, coefficient: float | Tensor, in_place: bool) -> Tensor:
    """``total + coefficient * tensor`` in one operator, in the type of ``total``."""
    tensor = tensor.to(total.dtype)
    if isinstance(coefficient, Tensor):
        factor = coefficient.to(total)
        return total.addcmul_(tensor, factor) if in_place else torch.addcmul(total, tensor, factor)
    return total.add_(tensor, alpha=coefficient) if in_place else torch.add(total, tensor, alpha=coefficient)


def ratio(numerator: float | Tensor, denominator: Tensor, otherwise: float = 0.0) -> Tensor:
    """``numerator / denominator`` where the latter is above zero, without asking the device which it is."""
    if isinstance(numerator, Tensor):
        numerator = numerator.to(denominator.device)
    return torch.where(denominator > 0, numerator / denominator, otherwise)


def _where(tensors: Gradients, chosen: Sequence[bool]) -> Gradients:
    return [tensor if on else None for tensor, on in zip(tensors, chosen, strict=True)]


def _choose(condition: Tensor, tensor: Tensor, other: Tensor | None) -> Tensor:
    return torch.where(condition.to(tensor.device), tensor, 0.0 if other is None else other)


def _like(coefficient: float | Tensor, tensor: Tensor) -> Any:
    return coefficient.to(tensor) if isinstance(coefficient, Tensor) else coefficient
