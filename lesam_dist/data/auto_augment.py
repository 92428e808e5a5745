"""RandAugment and TrivialAugment: which operations change a training image, and how strongly.

RandAugment (Cubuk et al., 2020) applies a few operations of one magnitude, TrivialAugment (Müller and Hutter, 2021) one
of a random magnitude, each drawn uniformly from the same fourteen, with torchvision's magnitudes.

An image's choice are two numbers for each operation: which one, and its *level*. Levels 0 to 30 are the magnitudes of
torchvision's table in its order, 31 to 61 the same with the other sign; operations without a sign use the first half.

What is done then: `lesam_dist.data.torchvision_augment` and `lesam_dist.data.dali_augment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

BINS = 31
LEVELS = 2 * BINS

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)
"""An operation's number is its place here."""

MOVES = OPERATIONS[1:6]
"""Those that move pixels and leave their colours."""

BLENDS = OPERATIONS[6:10]
"""Those that lie between an image and a poorer one, or beyond the image."""

Magnitudes = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Policy:
    """How an image's operations are chosen.

    Attributes:
        count: operations on each image.
        bin: magnitude of all, 0 to 30; None draws one for each.
        magnitudes: of each operation that has any, float64 ``(62,)`` by level. Shears are tangents, translations pixels
            or, in RandAugment, a share of the image's side; rotations are degrees, blends a difference from the factor
            1, posterize has bits that stay, solarize a share of 255.
        relative: whether translations are a share of the side.
    """

    count: int
    bin: int | None
    magnitudes: Magnitudes
    relative: bool

    @property
    def numbers(self) -> int:
        """Random numbers of an image."""
        return 3 * self.count

    def choose(self, uniform: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The operations of B images and their levels, each int32 ``(B, count)``.

        Args:
            uniform: float64 ``(B, numbers)`` in [0, 1).
        """
        which, bins, signs = uniform.reshape(len(uniform), self.count, 3).transpose(2, 0, 1)
        operation = (which * len(OPERATIONS)).astype(np.int32)
        level = np.full_like(operation, self.bin) if self.bin is not None else (bins * BINS).astype(np.int32)
        has_sign = np.isin(operation, [OPERATIONS.index(name) for name in (*MOVES, *BLENDS)])
        return operation, level + np.int32(BINS) * (has_sign & (signs < 0.5)).astype(np.int32)

    def magnitude(self, name: str, level: int, side: int) -> float:
        """Of an operation on a square image of ``side`` pixels; translations in whole pixels, as torchvision's."""
        if name not in self.magnitudes:
            return 0.0
        value = float(self.magnitudes[name][level])
        if name.startswith("translate"):
            return float(int(value * side if self.relative else value))
        return value


@lru_cache
def policy_of(name: str, operations: int, magnitude: int) -> Policy:
    """The policy of this name, "randaugment" or "trivialaugment"; the others are RandAugment's."""
    if name == "randaugment":
        return Policy(operations, magnitude, _table(shear=0.3, translate=150 / 331, rotate=30, blend=0.9, bits=4), True)
    return Policy(1, None, _table(shear=0.99, translate=32, rotate=135, blend=0.99, bits=6), False)


def _table(shear: float, translate: float, rotate: float, blend: float, bits: int) -> Magnitudes:
    """Magnitudes that grow with the bin from none to these; posterize keeps 8 bits down to ``8 - bits``."""

    def linspace(first: float, last: float) -> NDArray[np.float64]:  # torchvision's: whole pixels hang on its last bit
        return torch.linspace(first, last, BINS).double().numpy()

    rising = dict.fromkeys(("shear_x", "shear_y"), shear) | dict.fromkeys(("translate_x", "translate_y"), translate)
    rising |= {"rotate": rotate} | dict.fromkeys(BLENDS, blend)
    table = {name: np.concatenate([linspace(0, most), -linspace(0, most)]) for name, most in rising.items()}
    for name, values in (("posterize", np.rint(linspace(8, 8 - bits))), ("solarize", linspace(1, 0))):
        table[name] = np.concatenate([values, values])
    return table
