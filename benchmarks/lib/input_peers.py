"""Other people's ways to read training images: the same files, crops of the same law, float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224

Epoch = Callable[[int], Iterable[Any]]
Peer = Callable[[Path, int, int], Epoch]


def _epochs(dataset: Any, batch: int, workers: int) -> Epoch:
    loader: DataLoader[Any] = DataLoader(
        dataset, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    return lambda _: loader


def _normalised(first: list[Any]) -> v2.Compose:
    """As torchvision's training reference has it."""
    crop = [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*first, *crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def pillow(root: Path, batch: int, workers: int) -> Epoch:
    """torchvision's reference: Pillow decodes and resizes."""
    return _epochs(ImageFolder(root / "train", _normalised([])), batch, workers)


def decode_image(root: Path, batch: int, workers: int) -> Epoch:
    """torchvision on tensors: `torchvision.io.decode_image`, and v2's transforms."""
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_image as decode

    def load(path: str) -> Any:
        return decode(path, ImageReadMode.RGB)

    crop = [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return _epochs(ImageFolder(root / "train", transform, loader=load), batch, workers)


def timm(root: Path, batch: int, workers: int) -> Epoch:
    """timm's loader without its prefetcher, which is for GPUs, and without colour jitter."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root / "train"),
        (3, SIDE, SIDE),
        batch,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        persistent_workers=True,
    )
    return lambda _: loader


PEERS: Mapping[str, Peer] = {
    "torchvision, Pillow": pillow,
    "torchvision v2, decode_image": decode_image,
    **({"timm": timm} if find_spec("timm") else {}),
}
