"""Read image files with patience, and decode them with Pillow as the torchvision backend does."""

from __future__ import annotations

import errno
import io
import time

import numpy as np
from PIL import Image

# What a network file system says of a file that may be there again in a moment.
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_PAUSES = (0.1, 0.3, 1.0)  # seconds


def read_file(path: str, *, patient: bool = True) -> bytes:
    """All bytes of a file.

    Args:
        path: of the file.
        patient: after an error that may pass (EIO, ESTALE, ETIMEDOUT), try again three times within 1.4 s.

    Raises:
        OSError: it cannot be read.
    """
    for pause in _PAUSES if patient else ():
        try:
            return _read(path)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
        time.sleep(pause)
    return _read(path)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def open_image(data: bytes) -> Image.Image:
    """An image of which no pixel is decoded yet. Pillow raises whatever a broken file leads it to."""
    return Image.open(io.BytesIO(data))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the whole image, to 8 bits in three channels. Pillow raises whatever a broken file leads it to."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")
