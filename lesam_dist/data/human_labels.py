"""The labels that people gave to CIFAR's training images: CIFAR-N (Wei et al., 2022)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesam_dist.errors import UserError

CLEAN = "clean_label"
_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "float32", "float64")
# What a pickled NumPy array names, in both spellings: NumPy 2 has moved one module.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in _DTYPES),
]


def read_human_labels(file: Path, name: str, labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """One set of labels of CIFAR-10_human.pt or CIFAR-100_human.pt, in torchvision's order of the images.

    The file is a pickle of NumPy arrays: nothing but these, and what torch takes for weights, is built from it.

    Args:
        file: of github.com/UCSC-REAL/cifar-10-100n.
        name: which of the sets in it.
        labels: ``(N,)`` of the data, which the file's own clean labels must be.
        num_classes: of the data.

    Returns:
        int64 ``(N,)``.

    Raises:
        UserError: the file is missing or something else, has no such set, or is of other images.
    """
    found = _read(file)
    if name not in found:
        raise UserError(
            f"data.label_noise.labels is {name}, which is not in '{file}': it has "
            f"{', '.join(map(str, found)) or 'nothing'}."
        )
    if CLEAN not in found:
        raise UserError(f"'{file}' has no {CLEAN}, by which its images are known: take the file of CIFAR-N.")
    clean, noisy = (_integers(file, key, found[key]) for key in (CLEAN, name))
    for key, values in ((CLEAN, clean), (name, noisy)):
        if len(values) != len(labels):
            raise UserError(
                f"'{file}' has {len(values)} labels as {key}, but there are {len(labels)} training images: give the "
                "file of this data set."
            )
    differ = np.flatnonzero(clean != labels)
    if len(differ):
        i = int(differ[0])
        raise UserError(
            f"'{file}' is of other images, or in another order: its {CLEAN} differs from the data's labels in "
            f"{len(differ)} of {len(labels)} (first in number {i}: {clean[i]}, not {labels[i]})."
        )
    if not (noisy.min(initial=0) >= 0 and noisy.max(initial=0) < num_classes):
        raise UserError(f"'{file}' has labels outside 0 to {num_classes - 1} as {name}: copy it again.")
    return noisy


def _read(file: Path) -> dict[Any, Any]:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            found = torch.load(file, "cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"data.label_noise.file '{file}' cannot be read ({error.strerror or error}): get it from "
            "github.com/UCSC-REAL/cifar-10-100n, folder data."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.label_noise.file '{file}' is damaged, or no file of CIFAR-N, which holds arrays by name and nothing "
            "else: copy it again."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"data.label_noise.file '{file}' is no file of CIFAR-N, which holds arrays by name.")
    return found


def _integers(file: Path, name: str, values: Any) -> NDArray[np.int64]:
    array = np.asarray(values.numpy() if isinstance(values, Tensor) else values)
    if array.dtype.kind not in "iu":
        raise UserError(f"'{file}' has {array.dtype} as {name}: it should be whole numbers. Copy it again.")
    return array.reshape(-1).astype(np.int64)
