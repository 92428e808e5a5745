"""ResNets and ViTs for machines with a GPU, torch and triton alone. A test holds them against torchvision's: the same
parameters in the same order, the same outputs.

They serve where torchvision is, too, so that numbers of two machines compare. Initialisation is torch's default: it
does not matter for time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as in ResNet v1.5), 1x1, each with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.project = None
        if project:
            self.project = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.project is None else self.project(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """(B, 3, H, W) to (B, classes). ResNet-50: blocks (3, 4, 6, 3)."""

    def __init__(self, blocks: tuple[int, ...], classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        stages, channels = [], 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                first = block == 0
                stages.append(Bottleneck(channels, width * 2**stage, 2 if first and stage else 1, first))
                channels = 4 * width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of 4 * dim."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.up, self.down = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """(B, 3, image, image) to (B, classes). ViT-B/16: 12 layers, dim 768, 12 heads."""

    def __init__(self, layers: int, dim: int, heads: int, image: int = 224, classes: int = 1000) -> None:
        super().__init__()
        patch = 16
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patches = nn.Conv2d(3, dim, patch, patch)
        positions = torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02
        self.positions = nn.ParameterList([positions])  # a list, so that they come after the patches' weights
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions[0]
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet50": lambda image: ResNet((3, 4, 6, 3)),
    "vit_b_16": lambda image: ViT(12, 768, 12, image),
    "resnet101": lambda image: ResNet((3, 4, 23, 3)),
    "vit_l_16": lambda image: ViT(24, 1024, 16, image),
    "resnet_tiny": lambda image: ResNet((1, 1), classes=10, width=8),  # the tiny ones are for the tests
    "vit_tiny": lambda image: ViT(2, 32, 2, image, classes=10),
}
"""Name to a function of the image's side in pixels."""
