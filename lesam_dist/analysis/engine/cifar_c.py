"""CIFAR-10-C and CIFAR-100-C from their files: the 10,000 test images of CIFAR, in five severities of each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist.errors import UserError

IMAGES = 10_000  # of each severity, which are behind each other
SIDE = 32
_ROWS = 5 * IMAGES


class CifarC:
    """Images and labels of a folder with ``labels.npy`` and a ``KIND.npy`` for each kind, mapped into memory.

    Args:
        root: the folder.
        kinds: those that are needed.

    Raises:
        UserError: a file is missing, cannot be read, or is not of the published shape and type.
    """

    def __init__(self, root: Path, kinds: Sequence[str]) -> None:
        self.root = root
        if not root.is_dir():
            raise UserError(
                f"corruptions_root '{root}' does not exist, or is no folder: give the one of CIFAR-10-C or CIFAR-100-C."
            )
        missing = [name for name in ("labels", *kinds) if not (root / f"{name}.npy").is_file()]
        if missing:
            files = ", ".join(f"{name}.npy" for name in missing)
            raise UserError(f"corruptions_root '{root}' has no {files}: complete it, or choose other corruptions.")
        self._labels = _mapped(root / "labels.npy", (_ROWS,), np.integer, "integers")
        self._images = {
            kind: _mapped(root / f"{kind}.npy", (_ROWS, SIDE, SIDE, 3), np.uint8, "uint8") for kind in kinds
        }

    @property
    def digest(self) -> str:
        """Of the labels, and of an image of each kind and severity: others of this shape have another one."""
        digest = hashlib.blake2b(np.ascontiguousarray(self._labels, dtype=np.int64).tobytes(), digest_size=8)
        for kind, images in self._images.items():
            digest.update(kind.encode() + np.ascontiguousarray(images[::IMAGES]).tobytes())
        return digest.hexdigest()

    def require_classes(self, count: int) -> None:
        """Raise a `UserError` unless all labels are classes of a model with so many outputs."""
        lowest, highest = int(self._labels.min()), int(self._labels.max())
        if lowest < 0 or highest >= count:
            raise UserError(
                f"'{self.root / 'labels.npy'}' has labels from {lowest} to {highest}, and the model has {count} "
                "classes: give the corruptions of the data that it was trained on."
            )

    def batch(
        self, kind: str, severity: int, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (B, 32, 32, 3) and labels (B,) of these test images, 0 to 9,999."""
        rows = numbers + (severity - 1) * IMAGES
        return np.asarray(self._images[kind][rows]), np.asarray(self._labels[rows], dtype=np.int64)


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any, name: str) -> NDArray[Any]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"'{path}' cannot be read as an array of numpy: {reason}.") from error
    if not isinstance(found, np.ndarray) or found.shape != shape or not np.issubdtype(found.dtype, dtype):
        what = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise UserError(f"'{path}' holds {what}: of CIFAR-10-C and CIFAR-100-C it is {name} of shape {shape}.")
    return found
