"""The operations of RandAugment and TrivialAugment as torchvision has them: bilinear, black where nothing is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lesam_dist.data.auto_augment import OPERATIONS, Policy

Numbers = Sequence[int] | NDArray[np.int32]


def augment(image: Tensor, policy: Policy, operations: Numbers, levels: Numbers) -> Tensor:
    """Apply an image's operations, one after the other.

    Args:
        image: uint8 ``(3, S, S)``, after crop, resize and flip.
        policy: that chose them.
        operations, levels: of the image, each ``(count,)``.

    Returns:
        uint8 ``(3, S, S)``.
    """
    for number, level in zip(operations, levels, strict=True):
        name = OPERATIONS[number]
        image = _APPLY[name](image, policy.magnitude(name, int(level), image.shape[-1]))
    return image


def _affine(image: Tensor, *, translate: Sequence[int] = (0, 0), shear: Sequence[float] = (0.0, 0.0)) -> Tensor:
    """Sheared about the top left corner: tangents across and down."""
    moved: Tensor = F.affine(
        image,
        angle=0.0,
        translate=list(translate),
        scale=1.0,
        shear=[math.degrees(math.atan(tangent)) for tangent in shear],
        interpolation=InterpolationMode.BILINEAR,
        center=[0, 0],
    )
    return moved


_APPLY: dict[str, Callable[[Tensor, float], Any]] = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, tangent: _affine(image, shear=(tangent, 0.0)),
    "shear_y": lambda image, tangent: _affine(image, shear=(0.0, tangent)),
    "translate_x": lambda image, pixels: _affine(image, translate=(int(pixels), 0)),
    "translate_y": lambda image, pixels: _affine(image, translate=(0, int(pixels))),
    "rotate": lambda image, degrees: F.rotate(image, degrees, interpolation=InterpolationMode.BILINEAR),
    "brightness": lambda image, change: F.adjust_brightness(image, 1 + change),
    "color": lambda image, change: F.adjust_saturation(image, 1 + change),
    "contrast": lambda image, change: F.adjust_contrast(image, 1 + change),
    "sharpness": lambda image, change: F.adjust_sharpness(image, 1 + change),
    "posterize": lambda image, bits: F.posterize(image, int(bits)),
    "solarize": lambda image, share: F.solarize(image, 255 * share),
    "auto_contrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
}
