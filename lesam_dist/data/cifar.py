"""CIFAR-10 and CIFAR-100: small enough to stay on the device, where whole batches are cropped and flipped at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, CIFAR100

from lesam_dist.data.cifar_transform import SIDE, CifarTransform, crop_and_flip, cut_out, draw
from lesam_dist.data.sampling import Sampling
from lesam_dist.errors import UserError

DATASETS: dict[str, type[CIFAR10]] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


@dataclass(frozen=True, eq=False)
class CifarSplit:
    """The 50,000 training or 10,000 test images.

    Attributes:
        root: the folder that holds torchvision's ``cifar-10-batches-py`` or ``cifar-100-python``.
        classes: class names in label order (CIFAR-100: the fine ones).
        images: uint8 ``(N, 3, 32, 32)``, RGB.
        labels: int64 ``(N,)``.
    """

    root: Path
    classes: tuple[str, ...]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """Of all pixels and labels."""
        digest = hashlib.blake2b(self.images.data, digest_size=8)
        digest.update(self.labels.data)
        return digest.hexdigest()

    def with_labels(self, labels: NDArray[Any]) -> CifarSplit:
        """The same images with other labels."""
        return replace(self, labels=labels.astype(np.int64, copy=False))

    def take(self, samples: NDArray[np.int64]) -> CifarSplit:
        """Some of its samples alone."""
        return replace(self, images=self.images[samples], labels=self.labels[samples])


def prepare_cifar(name: str, root: Path) -> None:
    """Download a data set with torchvision unless it is in ``root``, whole (torchvision checks the files' MD5 sums).

    Not for several processes at once: call it in one, then `load_cifar` in all.

    Args:
        name: "cifar10" or "cifar100".
        root: see `CifarSplit`.

    Raises:
        UserError: it is not there and cannot be downloaded; names the file to put there.
    """
    _open(name, root, train=False, download=True)


def load_cifar(name: str, root: Path) -> tuple[CifarSplit, CifarSplit]:
    """The training and the test images, read by torchvision.

    Raises:
        UserError: the files are missing or damaged.
    """
    root = Path(root).expanduser()
    train, test = (_open(name, root, train=train, download=False) for train in (True, False))
    return _split(root, train), _split(root, test)


def _open(name: str, root: Path, *, train: bool, download: bool) -> CIFAR10:
    cls, root = DATASETS[name], Path(root).expanduser()
    try:
        return cls(root, train=train, download=download)
    except (OSError, HTTPException, RuntimeError) as error:  # no network, no right to write; missing, another MD5 sum
        files = [*(file for file, _ in (*cls.train_list, *cls.test_list)), cls.meta["filename"]]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". You can use")[0]
        raise UserError(
            f"{name} in '{root}' is missing or damaged, and was not downloaded ({reason}): put {cls.filename} from "
            f"{cls.url} into that folder, or unpack it there, as {cls.base_folder}/ with {', '.join(files)}."
        ) from error


def _split(root: Path, dataset: CIFAR10) -> CifarSplit:
    images = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))  # torchvision's is a view in (N, S, S, 3)
    return CifarSplit(root, tuple(dataset.classes), images, np.asarray(dataset.targets, dtype=np.int64))


class DeviceImages:
    """A split whose images stay on the device as uint8, and so do all operations on them.

    Args:
        split: from `load_cifar`.
        transform: what is done to a batch.
        device: where the images are kept: 3 KB each, so 184 MB for training and test images.
    """

    def __init__(self, split: CifarSplit, transform: CifarTransform, device: torch.device) -> None:
        self._transform, self._device = transform, device
        self._data: tuple[Tensor, Tensor] | None = (
            torch.from_numpy(split.images).to(device),
            torch.from_numpy(split.labels).to(device),
        )
        self._mean, self._std = (
            torch.tensor([255 * value for value in values], device=device).view(1, 3, 1, 1)
            for values in (transform.mean, transform.std)
        )

    def close(self) -> None:
        self._data = None

    def batch(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images, float32 ``(B, 3, S, S)``, and labels, int64 ``(B,)``.

        Args:
            numbers: ``(1, B)`` the samples, or ``(6, B)`` with their draws below: to the device in one copy.
        """
        if self._data is None:
            raise RuntimeError("this loader is closed")
        host = torch.from_numpy(numbers)
        if self._device.type == "cuda":
            host = host.pin_memory()  # else the copy would wait for the device
        samples, *draws = host.to(self._device, non_blocking=True)
        images, labels = (part.index_select(0, samples) for part in self._data)
        transform = self._transform
        if draws:
            top, left, flip, hole_top, hole_left = draws
            images = crop_and_flip(images, top, left, flip, transform.crop_padding)
        images = images.float().sub_(self._mean).div_(self._std)
        if draws and transform.cutout:
            cut_out(images, hole_top, hole_left, transform.cutout)
        if transform.image_size != SIDE:
            images = F.interpolate(images, size=transform.image_size, mode="bilinear", antialias=True)
        return images, labels


class CifarLoader:
    """See ``Loader``.

    Args:
        split, transform, device: see `DeviceImages`.
        train, batch_size, seed, rank, world_size, repeats: see `Sampling`.

    Raises:
        UserError: as `Sampling`.
    """

    def __init__(
        self,
        split: CifarSplit,
        *,
        transform: CifarTransform,
        train: bool,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        repeats: int = 1,
    ) -> None:
        self._sampling = Sampling(split, train, batch_size, seed, rank, world_size, repeats=repeats if train else 1)
        self._transform = transform
        self._images = DeviceImages(split, transform, device)

    def __len__(self) -> int:
        return len(self._sampling)

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        sampling = self._sampling
        for i, batch in enumerate(sampling.batches(index, start), start):
            if not sampling.train:
                yield self._images.batch(batch[None])
                continue
            draws = draw(self._transform, sampling.positions(i), seed=sampling.seed, epoch=index)
            yield self._images.batch(np.stack([batch, *draws]))

    def state_dict(self) -> dict[str, Any]:
        return self._sampling.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampling.load_state_dict(state)

    def close(self) -> None:
        self._images.close()
