"""Real datasets hold odd files. Each goes through both backends and is compared with Pillow, step by step."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lesam_dist.data import ImageFolder, Loader, Transform, scan_split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, RESIZE = 48, 56

# In grey levels; 0.01 is for float32. Pillow rounds to 8 bits after resizing rows and again after columns. DALI rounds
# once, which is half a level from Pillow's second rounding: one level after it. torch rounds twice too, but its weights
# have fewer bits: values next to a half go the other way, a level in the rows, and one more where such rows are mixed.
TOLERANCE = {"dali": 1.01, "torchvision": 2.01}


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def odd_files(smooth: Callable[[int, int], Image.Image], rng: np.random.Generator) -> dict[str, bytes]:
    def side() -> int:
        return int(rng.integers(30, 250))

    def some() -> Image.Image:
        return smooth(side(), side())

    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: ImageFolder does not rotate, neither do we
    deep = np.asarray(some().convert("L")).astype(np.uint16) * 257
    return {
        "plain.JPEG": encode(some(), "JPEG", quality=90),
        "progressive.jpg": encode(some(), "JPEG", progressive=True),
        "full_chroma.jpeg": encode(some(), "JPEG", subsampling=0),
        "grey.JPEG": encode(some().convert("L"), "JPEG"),
        "cmyk.JPEG": encode(some().convert("CMYK"), "JPEG", quality=95),
        "png_inside.JPEG": encode(some(), "PNG"),
        "rotated.JPG": encode(some(), "JPEG", exif=rotated),
        "palette.png": encode(some().convert("P"), "PNG"),
        "alpha.png": encode(some().convert("RGBA"), "PNG"),
        "one_bit.png": encode(some().convert("1"), "PNG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "windows.bmp": encode(some(), "BMP"),
        "photo.webp": encode(some(), "WEBP"),
        "scan.tiff": encode(some(), "TIFF"),
        "map.ppm": encode(some(), "PPM"),
        "row.JPEG": encode(smooth(1, side()), "JPEG", quality=95),
        "column.png": encode(smooth(side(), 1), "PNG"),
        "pixel.png": encode(smooth(1, 1), "PNG"),
        "panorama.JPEG": encode(smooth(20, 900), "JPEG"),
        "tower.JPEG": encode(smooth(901, 33), "JPEG"),
        "exact.png": encode(smooth(RESIZE, RESIZE), "PNG"),
    }


def oracle(path: str) -> np.ndarray:
    """Resize(56) and CenterCrop(48) as torchvision documents them, in plain Pillow; ``(3, 48, 48)``."""
    image = Image.open(path)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((RESIZE * width // short, RESIZE * height // short), Image.Resampling.BILINEAR)
    left, top = round((image.width - SIZE) / 2), round((image.height - SIZE) / 2)
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE))) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


@pytest.fixture
def folder(
    class_folder: Callable[..., Path], smooth: Callable[[int, int], Image.Image], rng: np.random.Generator
) -> ImageFolder:
    files = odd_files(smooth, rng)
    names = list(files)
    classes = {f"class{k}": {name: files[name] for name in names[k::3]} for k in range(3)}
    return scan_split(class_folder(train=classes), "train")


def test_evaluation(folder: ImageFolder, backend: str, load: Callable[..., Loader]) -> None:
    transform = Transform(image_size=SIZE, val_resize=RESIZE, mean=MEAN, std=STD)
    loader = load(folder, backend, train=False, batch_size=4, transform=transform)
    images, labels = (torch.cat(column) for column in zip(*loader.epoch(0), strict=True))
    assert images.shape == (len(folder), 3, SIZE, SIZE)
    assert [f"class{k}" for k in labels.tolist()] == [Path(path).parent.name for path in folder.paths]
    for path, image in zip(folder.paths, images.numpy(), strict=True):
        grey_levels = 255 * np.abs(image - oracle(path)) * np.reshape(STD, (3, 1, 1))
        assert grey_levels.max() <= TOLERANCE[backend], path
        assert grey_levels.mean() <= 0.3, path


def test_training(folder: ImageFolder, backend: str, load: Callable[..., Loader]) -> None:
    """Any crop of any of them: the right shape and label, and colours that the image has."""
    transform = Transform(image_size=SIZE, val_resize=RESIZE, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    loader = load(folder, backend, batch_size=len(folder), transform=transform)
    for epoch in range(3):
        [(images, labels)] = loader.epoch(epoch)
        assert images.shape == (len(folder), 3, SIZE, SIZE)
        assert sorted(labels.tolist()) == sorted(folder.labels.tolist())
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 255.01
