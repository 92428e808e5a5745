"""A method's arguments: their types and ranges, as annotations that construction, config and `--help` all read.

``rho: NonNegative = 0.05`` in a signature is the declaration and the check. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included unless open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below and math.isfinite(value))

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
ShareBelowOne = Annotated[float, Range(0, 1, open_high=True)]
Count = Annotated[int, Range(1)]

NAMESPACE: dict[str, Any] = {
    "NonNegative": NonNegative,
    "Positive": Positive,
    "Share": Share,
    "PositiveShare": PositiveShare,
    "ShareBelowOne": ShareBelowOne,
    "Count": Count,
    "Literal": Literal,
}
"""What an annotation in a method's signature may be made of, beside int, float, bool, str and None."""


@dataclass(frozen=True)
class Argument:
    """A hyper-parameter of a method.

    Attributes:
        name: as in the signature of its class.
        type: the annotation, evaluated.
        default: its value where it is not given.
        text: what it means, from the class's docstring; without a full stop.
    """

    name: str
    type: Any
    default: Any
    text: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the type and in the range."""
        return any(_fits(option, value) for option in _options(self.type))

    def check(self, owner: str, value: Any) -> None:
        """Raise ValueError for a value of another type or out of range; ``owner`` is named in it."""
        if not self.accepts(value):
            raise ValueError(f"{owner}: {self.name} is {value!r}; it must be {self.expected}.")

    def typed(self, value: Any) -> Any:
        """A value that it accepts, as the float or the whole number that the annotation names."""
        for option in _options(self.type):
            kind = get_args(option)[0] if get_origin(option) is Annotated else option
            if kind in (int, float) and _fits(option, value):
                return kind(value)
        return value

    @property
    def expected(self) -> str:
        """What a value must be, in words: ``a finite number >= 0, or None``."""
        return ", or ".join(_word(option) for option in _options(self.type))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it takes, where they are listed; else none."""
        literals = [option for option in _options(self.type) if get_origin(option) is Literal]
        return tuple(choice for option in literals for choice in get_args(option))


def _options(annotation: Any) -> Iterable[Any]:
    """The members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _fits(option: Any, value: Any) -> bool:
    if option is type(None) or option is None:
        return value is None
    if option is Any:
        return True
    origin = get_origin(option)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(option))
    if origin is Annotated:
        kind, limits = get_args(option)
        return _fits(kind, value) and value in limits
    if option is float:
        return _is_number(value)
    if option is int:
        return _is_number(value) and value == int(value)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple))  # YAML has lists alone
    return isinstance(value, origin or option)


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number: Python's, numpy's, or a tensor of one element."""
    if isinstance(value, (bool, str)) or value is None:
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _word(option: Any) -> str:
    if option is type(None) or option is None:
        return "None"
    origin = get_origin(option)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(option))
    if origin is Annotated:
        kind, limits = get_args(option)
        return f"{_word(kind)} {limits}"
    names = {float: "a finite number", int: "a whole number", bool: "True or False", str: "a text", Any: "anything"}
    return names.get(option, str(option))
