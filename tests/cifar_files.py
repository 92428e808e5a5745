"""Small data sets in the files that CIFAR comes in: pickled dictionaries, whose MD5 sums torchvision checks."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from torchvision.datasets import CIFAR10, CIFAR100


class Images(NamedTuple):
    """uint8 ``(N, 3, 32, 32)`` and int64 ``(N,)``."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


def write_cifar(
    root: Path,
    name: str,
    sizes: tuple[int, int],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    balanced: bool = False,
) -> tuple[Images, Images]:
    """Write random training and test images to ``root`` as "cifar10" or "cifar100", and make theirs the right MD5 sums.

    CIFAR-10 has five training files; ``sizes[0]`` is a multiple of five. ``balanced``: all classes have as many images.
    """
    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    splits = []
    for attribute, size in zip(("train_list", "test_list"), sizes, strict=True):
        files = [file for file, _ in getattr(cls, attribute)]
        rows = rng.integers(0, 256, (size, 3072), dtype=np.uint8)
        classes = 10 if cls is CIFAR10 else 100
        labels = rng.permutation(np.arange(size) % classes) if balanced else rng.integers(0, classes, size)
        for file, part in zip(files, np.split(np.arange(size), len(files)), strict=True):
            entry: dict[str, Any] = {"batch_label": file, "data": rows[part], "filenames": [f"{i}.png" for i in part]}
            key = "labels" if cls is CIFAR10 else "fine_labels"
            entry |= {key: labels[part].tolist(), "coarse_labels": [0] * len(part)}
            _pickle(folder / file, entry)
        monkeypatch.setattr(cls, attribute, [[file, md5(folder / file)] for file in files])
        splits.append(Images(rows.reshape(-1, 3, 32, 32), labels))
    meta = dict(cls.meta)
    _pickle(folder / meta["filename"], {meta["key"]: class_names(name)})
    monkeypatch.setattr(cls, "meta", meta | {"md5": md5(folder / meta["filename"])})
    return splits[0], splits[1]


def pack(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the unpacked files by the archive that holds them."""
    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = root / cls.base_folder
    with tarfile.open(root / cls.filename, "w:gz") as archive:
        archive.add(folder, cls.base_folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    monkeypatch.setattr(cls, "tgz_md5", md5(root / cls.filename))


def class_names(name: str) -> list[str]:
    return [f"class {i}" for i in range(10 if name == "cifar10" else 100)]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _pickle(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))  # as Python 2 wrote them
