"""Small class folders kept as CIFAR is: all images decoded once, at 32 x 32 pixels, and then on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesam_dist.data.cifar import CifarSplit
from lesam_dist.data.cifar_transform import SIDE
from lesam_dist.data.decode import decode_rgb
from lesam_dist.data.errors import Failure, reason_of, unreadable_image
from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.reading import read_file


def in_memory(folder: ImageFolder) -> CifarSplit:
    """Every image of class folders (of files, not of shards), resized to 32 x 32 pixels, whatever its shape: 3 KB each.

    Raises:
        UserError: an image cannot be read or decoded; names the file.
    """
    images = np.empty((len(folder), 3, SIDE, SIDE), np.uint8)
    for i, path in enumerate(folder.paths):
        images[i] = _small(i, path).transpose(2, 0, 1)
    return CifarSplit(Path(str(folder.root)), folder.classes, images, folder.labels.astype(np.int64))


def _small(index: int, path: str) -> NDArray[np.uint8]:
    size = None
    try:
        data = read_file(path)
        size = len(data)
        image = decode_rgb(data)
    except Exception as error:  # whatever a broken file leads Pillow to
        raise unreadable_image(Failure(index, path, reason_of(error), size)) from error
    return small(image)


def small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image (H, W, 3) of any shape at 32 x 32 pixels."""
    if image.shape[:2] == (SIDE, SIDE):
        return image
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
