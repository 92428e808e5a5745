"""`color_jitter.adjust` as a DALI graph: torchvision's formulas in DALI's arithmetic, to within rounding.

DALI's own operators would not do: its hue is a rotation in another colour space.
"""

from __future__ import annotations

from typing import Any

import nvidia.dali
from nvidia.dali.auto_aug.core import select
from nvidia.dali.pipeline import do_not_convert

from lesam_dist.data.color_jitter import OPERATIONS

dali: Any = nvidia.dali  # its type stubs leave out much of what it exports
fn, math, types = dali.fn, dali.math, dali.types


def color_inputs(count: int) -> list[tuple[Any, int]]:
    """Type and dimensions of an image's grey and, where it has ``count`` > 0 of them, its operations and factors, as
    `color_jitter.choose` has them; DALI warns of inputs that are not used.
    """
    return [(types.INT32, 0), *([(types.INT32, 1), (types.FLOAT, 1)] if count else [])]


def color_graph(image: Any, count: int, gray: Any, operations: Any = None, factors: Any = None) -> Any:
    """In a pipeline with conditionals.

    Args:
        image: uint8 ``(S, S, 3)``.
        count: operations on each image.
        gray, operations, factors: of `color_inputs`.
    """
    for k in range(count):
        image = select(_APPLY, operations[k], image, factors[k])
    return _whole(image * (1 - gray) + _gray(image) * gray)


@do_not_convert
def _whole(value: Any) -> Any:
    """To uint8 as torch does, which rounds down where DALI would round."""
    return fn.cast(math.clamp(math.floor(value), 0, 255), dtype=types.UINT8)


@do_not_convert
def _gray(image: Any) -> Any:
    """Whole grey levels, float ``(S, S, 1)``."""
    red, green, blue = _channels(image)
    return math.floor(red * 0.2989 + green * 0.587 + blue * 0.114)


@do_not_convert
def _channels(image: Any) -> list[Any]:
    return [image[:, :, i : i + 1] for i in range(3)]


@do_not_convert
def _brightness(image: Any, factor: Any) -> Any:
    return _whole(image * factor)


@do_not_convert
def _contrast(image: Any, factor: Any) -> Any:
    return _whole(image * factor + fn.reductions.mean(_gray(image)) * (1 - factor))


@do_not_convert
def _saturation(image: Any, factor: Any) -> Any:
    return _whole(image * factor + _gray(image) * (1 - factor))


@do_not_convert
def _hue(image: Any, turn: Any) -> Any:
    """In sixths of the circle: along it each channel goes between the darkest and the brightest as a trapezoid."""
    red, green, blue = _channels(image)
    high = math.max(math.max(red, green), blue)
    low = math.min(math.min(red, green), blue)
    span = fn.cast(high, dtype=types.FLOAT) - low
    divisor = math.max(span, 1)
    from_red = fn.cast(high == red, dtype=types.FLOAT)
    from_green = (1 - from_red) * (high == green)
    sixth = (
        from_red * (fn.cast(green, dtype=types.FLOAT) - blue)
        + from_green * (fn.cast(blue, dtype=types.FLOAT) - red + 2 * divisor)
        + (1 - from_red - from_green) * (fn.cast(red, dtype=types.FLOAT) - green + 4 * divisor)
    ) / divisor + 6 * turn
    turned = []
    for offset in (5, 3, 1):
        place = sixth + offset
        place = place - 6 * math.floor(place / 6)
        turned.append(high - span * math.clamp(math.min(place, 4 - place), 0, 1))
    return _whole(fn.cat(*turned, axis=2) * (255.999 / 255))


_APPLY: list[Any] = [_brightness, _contrast, _saturation, _hue]
assert len(_APPLY) == len(OPERATIONS)
