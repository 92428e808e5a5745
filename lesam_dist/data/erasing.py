"""Random erasing (Zhong et al., 2020): a rectangle of some training images is set to the mean colour.

As torchvision's ``RandomErasing(p)`` with its defaults, after normalisation: the area is uniform in 0.02 to 0.33 of the
image, the logarithm of height over width uniform in log 0.3 to log 3.3, the place uniform; of ten candidates the first
that is smaller than the image is taken.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AREA, RATIO, ATTEMPTS = (0.02, 0.33), (0.3, 3.3), 10
NUMBERS = 3 + 2 * ATTEMPTS
"""Random numbers of an image."""


def holes(uniform: NDArray[np.float64], probability: float, side: int) -> NDArray[np.int64]:
    """The rectangles of B images.

    Args:
        uniform: float64 ``(B, NUMBERS)`` in [0, 1).
        probability: share of the images that get one.
        side: of the images, in pixels.

    Returns:
        int64 ``(B, 4)``: top, left, height and width in pixels; 0 0 0 0 where there is none.
    """
    area = side * side * (AREA[0] + (AREA[1] - AREA[0]) * uniform[:, 3 : 3 + ATTEMPTS])
    low, high = np.log(RATIO)
    ratio = np.exp(low + (high - low) * uniform[:, 3 + ATTEMPTS :])
    sides = np.stack([np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))])  # heights, widths
    fits = np.all(sides < side, axis=0)
    height, width = sides[:, np.arange(len(uniform)), fits.argmax(axis=1)]
    top, left = (np.floor(uniform[:, 1 + i] * (side - size + 1)) for i, size in enumerate((height, width)))
    there = (uniform[:, 0] < probability) & np.any(fits, axis=1)
    rectangles: NDArray[np.int64] = (np.stack([top, left, height, width], axis=1) * there[:, None]).astype(np.int64)
    return rectangles


def erase(images: Tensor, rectangles: NDArray[np.int64]) -> None:
    """Set a rectangle of each image to zero, in place.

    Args:
        images: ``(B, C, S, S)``, normalised: zero is the mean colour.
        rectangles: from `holes`.
    """
    if not rectangles.any():
        return
    host = torch.from_numpy(rectangles.T.copy())
    if images.device.type == "cuda":
        host = host.pin_memory()  # else the copy would wait for the device
    top, left, height, width = host.to(images.device, non_blocking=True)
    position = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (
        (position >= first[:, None]) & (position < (first + size)[:, None])
        for first, size in ((top, height), (left, width))
    )
    images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
