"""scikit-learn's 1797 handwritten digits, as JPEG files.

``python -m lesam_dist.data.digits [ROOT]`` writes them (default: data/digits). The noisy variant has 30 training images
of each digit, of which 6 lie in the folder of another one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesam_dist.data.scans import Scans, prepare
from lesam_dist.errors import UserError

SIDE = 32  # pixels; the scans are 8 x 8


def _read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images of 32 x 32 pixels (bicubic)."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    small = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in small]
    return np.stack([np.asarray(each) for each in large]), labels


DIGITS = Scans(
    name="digits",
    source="scikit-learn's digits",
    total=1797,
    held_out=359,
    noisy_kept=30,
    noisy_wrong=6,
    suffix=".JPEG",
    read=_read,
)


def prepare_digits(root: Path, seed: int = 0, *, noisy: bool = False) -> Path:
    """`prepare` of these."""
    return prepare(DIGITS, root, seed, noisy=noisy)


def main(arguments: list[str]) -> int:
    try:
        root = prepare_digits(Path(arguments[0] if arguments else "data/digits"))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{root}: 1797 digits in train/ and val/, 32 x 32 pixels, 10 classes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
