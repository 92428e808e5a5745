"""Colour jitter and random grey with torchvision's own functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Numbers = Sequence[float] | NDArray[np.int32] | NDArray[np.float32]


def adjust(image: Tensor, operations: Numbers, factors: Numbers, gray: int) -> Tensor:
    """Apply an image's operations, one after the other, with torchvision's own functions.

    Args:
        image: uint8 ``(3, S, S)``.
        operations, factors, gray: of the image, from `color_jitter.choose`: ``(K,)``, ``(K,)`` and a number.

    Returns:
        uint8 ``(3, S, S)``.
    """
    for number, factor in zip(operations, factors, strict=True):
        image = _APPLY[int(number)](image, float(factor))
    return F.rgb_to_grayscale(image, num_output_channels=3) if gray else image


_APPLY: tuple[Callable[[Tensor, float], Any], ...] = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)
