"""The parameter shapes of well-known models, in the order of ``model.parameters()``: no model is built.

ResNets and ViTs as in torchvision, the WideResNet of Zagoruyko & Komodakis (2016) for CIFAR-100.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = tuple[int, ...]


def resnet(blocks: tuple[int, ...], classes: int = 1000) -> list[Shape]:
    """A bottleneck ResNet of He et al. (2015): ResNet-50 has blocks (3, 4, 6, 3)."""
    shapes = [*_conv_bn(3, 64, 7)]
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for block in range(count):
            shapes += [*_conv_bn(channels, width, 1), *_conv_bn(width, width, 3), *_conv_bn(width, 4 * width, 1)]
            if block == 0:
                shapes += _conv_bn(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, *_linear(channels, classes)]


def wide_resnet(depth: int, widen: int, classes: int) -> list[Shape]:
    """A pre-activation WideResNet for 32 x 32 images: depth 6n + 4, ``widen`` times 16, 32 and 64 channels."""
    shapes: list[Shape] = [(16, 3, 3, 3)]
    channels = 16
    for stage in range(3):
        width = 16 * widen * 2**stage
        for block in range((depth - 4) // 6):
            shapes += [(channels,), (channels,), (width, channels, 3, 3), (width,), (width,), (width, width, 3, 3)]
            if block == 0:
                shapes.append((width, channels, 1, 1))
            channels = width
    return [*shapes, (channels,), (channels,), *_linear(channels, classes)]


def vit(layers: int, dim: int, patch: int = 16, image: int = 224, classes: int = 1000) -> list[Shape]:
    """A Vision Transformer of Dosovitskiy et al. (2021) with an MLP of 4 * dim: B/16 is (12, 768), L/16 (24, 1024)."""
    tokens = (image // patch) ** 2 + 1
    shapes: list[Shape] = [(1, 1, dim), (dim, 3, patch, patch), (dim,), (1, tokens, dim)]
    norm: list[Shape] = [(dim,), (dim,)]
    for _ in range(layers):
        attention = [*_linear(dim, 3 * dim), *_linear(dim, dim)]
        shapes += [*norm, *attention, *norm, *_linear(dim, 4 * dim), *_linear(4 * dim, dim)]
    return [*shapes, *norm, *_linear(dim, classes)]


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


def _conv_bn(channels: int, width: int, kernel: int) -> list[Shape]:
    return [(width, channels, kernel, kernel), (width,), (width,)]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": lambda: resnet((3, 4, 6, 3)),
    "resnet101": lambda: resnet((3, 4, 23, 3)),
    "wrn_28_10": lambda: wide_resnet(28, 10, classes=100),
    "vit_b_16": lambda: vit(12, 768),
    "vit_l_16": lambda: vit(24, 1024),
    "small1000": small_tensors,
    "large": large_tensors,
    "tiny": lambda: [(3,), (5, 7), (1,), (2, 3, 3, 3), (129,)],  # for the tests
}
