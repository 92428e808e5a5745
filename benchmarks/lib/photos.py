"""JPEGs as ImageNet has them: parts of two photographs, 500 x 375 or upright, some 50 to 60 KB each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 500, 375
_QUALITY = 92


def write_photos(root: Path, images: int, seed: int) -> None:
    """``root/{train,val}/CLASS/NAME.JPEG``, an eighth as many for validation; every fourth is upright."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for split, count in (("train", images), ("val", max(1, images // 8))):
        for i in range(count):
            folder = root / split / f"{i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            part(photos[i % len(photos)], rng, upright=i % 4 == 3).save(folder / f"{i:06}.JPEG", quality=_QUALITY)


def part(photo: Image.Image, rng: np.random.Generator, *, upright: bool) -> Image.Image:
    """A random part of a photograph in `SIZE`, mirrored or not."""
    width = int(photo.width * rng.uniform(0.75, 0.85))
    height = width * SIZE[1] // SIZE[0]
    left, top = (int(rng.integers(0, room + 1)) for room in (photo.width - width, photo.height - height))
    image = photo.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.ROTATE_90) if upright else image
