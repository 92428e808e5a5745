"""What a vector is multiplied by: numbers of each param group, and scalars that are known on the device alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Numbers = tuple[float, ...]  # one, or one for each param group
Factors = tuple[Tensor | None, Tensor | None]


class Coefficient:
    """``shift + scale * tensor``; ``shift`` and ``scale`` are numbers, alike in all param groups or of each.

    So numbers that are combined with a device scalar cost no launch before the result is needed.
    """

    def __init__(self, shift: Numbers, scale: Numbers = (0.0,), tensor: Tensor | None = None) -> None:
        self.shift, self.scale, self.tensor = _shortest(shift), _shortest(scale), tensor

    @staticmethod
    def make(value: float | Tensor | Coefficient) -> Coefficient:
        """Of a number, a 0-d tensor, or what is one already."""
        if isinstance(value, Coefficient):
            return value
        return Coefficient((0.0,), (1.0,), value) if isinstance(value, Tensor) else Coefficient((float(value),))

    @property
    def is_number(self) -> bool:
        """Whether it is known on the host."""
        return self.tensor is None

    @property
    def is_one(self) -> bool:
        """Whether it is the number 1 in every param group."""
        return self.tensor is None and self.shift == (1.0,)

    @property
    def is_scalar(self) -> bool:
        """Whether it is alike in all param groups."""
        alike = len(self.shift) == len(self.scale) == 1
        return alike and (self.tensor is None or self.tensor.dim() == 0)

    def of(self, group: int) -> float | Tensor:
        """Its value in a param group."""
        shift, scale = self.shift[group % len(self.shift)], self.scale[group % len(self.scale)]
        if self.tensor is None:
            return shift
        value = self.tensor[group] if self.tensor.dim() else self.tensor
        value = value if scale == 1.0 else value * scale
        return value if shift == 0.0 else value + shift

    def __add__(self, other: float | Tensor | Coefficient) -> Coefficient:
        other = Coefficient.make(other)
        shift = _each(float.__add__, self.shift, other.shift)
        if self.tensor is None or other.tensor is None:
            source = other if self.tensor is None else self
            return Coefficient(shift, source.scale, source.tensor)
        if self.tensor is other.tensor:
            return Coefficient(shift, _each(float.__add__, self.scale, other.scale), self.tensor)
        return Coefficient(shift, (1.0,), _scaled(self) + _scaled(other))

    def __mul__(self, other: float | Tensor | Coefficient) -> Coefficient:
        if not isinstance(other, (float, int, Tensor, Coefficient)):
            return NotImplemented  # a vector, whose turn it then is
        other = Coefficient.make(other)
        if self.tensor is not None and other.tensor is not None:
            return Coefficient((0.0,), (1.0,), _value(self) * _value(other))
        numbers, source = (self, other) if self.tensor is None else (other, self)
        shift, scale = (_each(float.__mul__, numbers.shift, own) for own in (source.shift, source.scale))
        return Coefficient(shift, scale, source.tensor)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Coefficient:
        return self * -1.0

    def __sub__(self, other: float | Tensor | Coefficient) -> Coefficient:
        return self + Coefficient.make(other) * -1.0

    def __rsub__(self, other: float | Tensor | Coefficient) -> Coefficient:
        return Coefficient.make(other) - self


def _shortest(numbers: Numbers) -> Numbers:
    alike = len(numbers) > 1 and all(number == numbers[0] for number in numbers)
    return numbers[:1] if alike else numbers


def _each(operation: Callable[[float, float], float], first: Numbers, second: Numbers) -> Numbers:
    if len(first) == len(second) == 1:
        return (operation(first[0], second[0]),)
    count = max(len(first), len(second))
    return tuple(operation(first[i % len(first)], second[i % len(second)]) for i in range(count))


def _scaled(c: Coefficient) -> Tensor:
    """Its part with the tensor."""
    return _value(Coefficient((0.0,), c.scale, c.tensor))


def _value(c: Coefficient) -> Tensor:
    """The coefficient of a tensor as one: 0-d, or (groups,) where the param groups differ."""
    assert c.tensor is not None
    groups = max(len(c.shift), len(c.scale), c.tensor.numel())
    values = [torch.as_tensor(c.of(group)) for group in range(groups)]
    return values[0] if groups == 1 else torch.stack(values)


def lower(a: Coefficient, b: Coefficient, groups: int) -> tuple[list[tuple[float, float]], Factors]:
    """Coefficients of g_hat and g for the fused update: numbers of each param group, and factors of them.

    Returns:
        ``(a, b)`` of each of the groups; and what multiplies all a, and all b: a 0-d or (groups,) tensor, or None.
    """
    (numbers_a, factors_a), (numbers_b, factors_b) = _split(a, groups), _split(b, groups)
    return list(zip(numbers_a, numbers_b, strict=True)), (factors_a, factors_b)


def times(number: float, factors: Tensor | None, group: int) -> float | Tensor:
    """A param group's number times its factor, see `lower`."""
    if factors is None:
        return number
    return number * (factors[group] if factors.dim() else factors)


def _split(c: Coefficient, groups: int) -> tuple[Sequence[float], Tensor | None]:
    """Numbers of each group and one tensor, whose product is the coefficient."""
    if c.tensor is None:
        return [c.shift[i % len(c.shift)] for i in range(groups)], None
    if c.shift == (0.0,) and c.tensor.dim() == 0:
        return [c.scale[i % len(c.scale)] for i in range(groups)], c.tensor
    return [1.0] * groups, _value(c)


ONE = Coefficient((1.0,))
ZERO = Coefficient((0.0,))
