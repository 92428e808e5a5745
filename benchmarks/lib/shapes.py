"""Parameter lists by name: shapes of well-known models, in the order of ``model.parameters()``, and two extremes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lib.models import NETWORKS

Shape = tuple[int, ...]


def network(name: str) -> list[Shape]:
    """Of a network in `models`, for ImageNet; nothing is allocated."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in NETWORKS[name](224).parameters()]


def wide_resnet(depth: int, widen: int, classes: int) -> list[Shape]:
    """A pre-activation WideResNet (Zagoruyko & Komodakis, 2016) for 32 x 32 images: depth 6n + 4, ``widen`` times 16,
    32 and 64 channels."""
    shapes: list[Shape] = [(16, 3, 3, 3)]
    channels = 16
    for stage in range(3):
        width = 16 * widen * 2**stage
        for block in range((depth - 4) // 6):
            shapes += [(channels,), (channels,), (width, channels, 3, 3), (width,), (width,), (width, width, 3, 3)]
            if block == 0:
                shapes.append((width, channels, 1, 1))
            channels = width
    return [*shapes, (channels,), (channels,), (classes, channels), (classes,)]


def small_tensors(count: int = 1000) -> list[Shape]:
    """Many tensors of 1 to 4096 elements, odd sizes among them: launches and tables cost more than memory here."""
    sizes = (1, 17, 64, 128, 255, 256, 512, 1000, 2048, 4096)
    return [(sizes[i % len(sizes)],) for i in range(count)]


def large_tensors() -> list[Shape]:
    """A few large ones, 168 M elements: nothing but memory bandwidth."""
    return [(8192, 8192), (8192, 8192), (4096, 8192), (8192,)]


def numel(shapes: list[Shape]) -> int:
    """Elements of all tensors."""
    return sum(math.prod(shape) for shape in shapes)


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": lambda: network("resnet50"),
    "resnet101": lambda: network("resnet101"),
    "wrn_28_10": lambda: wide_resnet(28, 10, classes=100),
    "vit_b_16": lambda: network("vit_b_16"),
    "vit_l_16": lambda: network("vit_l_16"),
    "small1000": small_tensors,
    "large": large_tensors,
    "tiny": lambda: [(3,), (5, 7), (1,), (2, 3, 3, 3), (129,)],  # for the tests
}
