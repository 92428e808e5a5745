"""Files as those of CIFAR-10-C, of which only a few images are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

IMAGES = 10_000


def write_files(
    root: Path, kinds: Sequence[str], count: int, seed: int, classes: int = 2
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.int64]]:
    """Random images where an analysis of ``count`` of them by this seed looks, and black ones elsewhere.

    Returns:
        By kind its images at each severity, (5, count, 32, 32, 3); and their labels, (count,).
    """
    random = np.random.default_rng(seed)
    numbers = np.sort(np.random.default_rng([seed, 0]).permutation(IMAGES)[:count])  # as the docs say
    labels = random.integers(classes, size=IMAGES)
    root.mkdir(parents=True, exist_ok=True)
    np.save(root / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    images = {}
    for kind in kinds:
        images[kind] = random.integers(256, size=(5, count, 32, 32, 3), dtype=np.uint8)
        file = np.lib.format.open_memmap(root / f"{kind}.npy", "w+", np.uint8, (5 * IMAGES, 32, 32, 3))  # sparse
        for severity in range(5):
            file[numbers + severity * IMAGES] = images[kind][severity]
        file.flush()
    return images, labels[numbers]
