"""Decode image files on the CPU as the torchvision backend does: JPEGs with libjpeg-turbo, all others with Pillow."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

_JPEG = b"\xff\xd8"
_COLOURS = ("YCbCr", "RGB", "Gray")  # of CMYK the two have different ideas


def decode_rgb(data: bytes) -> NDArray[np.uint8]:
    """Decode a whole image, to 8 bits in three channels: ``(H, W, 3)``.

    simplejpeg calls the library that Pillow calls, and gives the same bits in two thirds of the time. Pillow reads what
    it refuses (CMYK, small faults), or says what is wrong with it.

    Raises:
        Exception: whatever a broken file leads Pillow to.
    """
    if data.startswith(_JPEG):
        with suppress(ValueError):
            if simplejpeg.decode_jpeg_header(data)[2] in _COLOURS:
                image: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
                return image
    with open_image(data) as file:
        return np.array(to_rgb(file))


def open_image(data: bytes) -> Image.Image:
    """An image of which no pixel is decoded yet. Pillow raises whatever a broken file leads it to."""
    return Image.open(io.BytesIO(data))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the whole image, to 8 bits in three channels. Pillow raises whatever a broken file leads it to."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")
