"""Colour jitter and random grey of training images: torchvision's ``ColorJitter`` and ``RandomGrayscale``.

Brightness, contrast and saturation are multiplied by a factor that is uniform in max(0, 1 - amount) to 1 + amount, the
hue is turned by a share of the circle that is uniform in -amount to amount; one after the other, in an order that is
drawn for each image. Then some images become grey. After crop, flip and `lesam_dist.data.auto_augment`.

What is done then: `lesam_dist.data.torchvision_color` and `lesam_dist.data.dali_color`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""An operation's number is its place here, as its amount's is."""

HUE = OPERATIONS.index("hue")
COLOR_NUMBERS = 2 * len(OPERATIONS) + 1
"""Random numbers of an image."""

Amounts = tuple[float, float, float, float]
"""Of each operation."""


def choose(
    uniform: NDArray[np.float64], amounts: Amounts, grayscale: float
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """What is done to B images. Operations with an amount of 0 are left out, which leaves K.

    Args:
        uniform: float64 ``(B, COLOR_NUMBERS)`` in [0, 1).
        amounts: of each operation; hue's at most 0.5.
        grayscale: share of the images that become grey.

    Returns:
        The operations in their order, int32 ``(B, K)``; the factor of each, or its turn, float32 ``(B, K)``; and 1 for
        each image that becomes grey, int32 ``(B,)``.
    """
    count, most = len(OPERATIONS), np.array(amounts)
    order = np.argsort(uniform[:, :count], axis=1)
    order = order[np.isin(order, np.flatnonzero(most))].reshape(len(uniform), np.count_nonzero(most))
    low, high = np.maximum(0, 1 - most), 1 + most
    low[HUE], high[HUE] = -most[HUE], most[HUE]
    factors = np.take_along_axis(low + (high - low) * uniform[:, count:-1], order, axis=1)
    return order.astype(np.int32), factors.astype(np.float32), (uniform[:, -1] < grayscale).astype(np.int32)
