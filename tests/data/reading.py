"""What the tests of loaders share: a few images of a folder, and an epoch of them as two tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lesam_dist.data import ImageFolder, Loader

Load = Callable[..., Loader]


def read(loader: Loader, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def take(folder: ImageFolder, n: int) -> ImageFolder:
    step = len(folder) // n
    return ImageFolder(folder.root, folder.classes, folder.paths[: n * step : step], folder.labels[: n * step : step])
