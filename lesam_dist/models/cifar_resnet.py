"""ResNets for small images: a 3x3 stem that keeps the resolution, where ImageNet's quarters it.

`cifar_resnet8/20/32/44/56/110` are the networks of He et al. (2016), Section 4.2: depth 6n + 2, three stages of 16,
32 and 64 channels. They differ from the paper in the shortcut, a 1x1 convolution (option B) where it pads with zeros.
`cifar_resnet32_pad` is the paper's (option A), `cifar_resnet32x4_pad` four times as wide: those of LDAM-DRW and GLMC.
`cifar_resnet18/34/50` are torchvision's ResNets with the 3x3 stem and no max-pooling, as used on CIFAR since.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

_LAYERS = {18: (BasicBlock, [2, 2, 2, 2]), 34: (BasicBlock, [3, 4, 6, 3]), 50: (Bottleneck, [3, 4, 6, 3])}
_THIN_DEPTHS = (8, 20, 32, 44, 56, 110)


class PaddedShortcut(nn.Module):
    """Every second row and column, and channels of zeros on both sides: (B, C, H, W) to (B, planes, H / 2, W / 2)."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        before = (planes - inplanes) // 2
        self.padding = (0, 0, 0, 0, before, planes - inplanes - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.padding)


class ThinResNet(nn.Module):
    """He et al.'s CIFAR ResNet of depth 6n + 2.

    Args:
        depth: 6n + 2 for n basic blocks a stage.
        num_classes: size of the last layer.
        zero_init_residual: start each residual branch at zero.
        width: channels of the first stage; each of the other two has twice as many as the one before.
        padded: shortcuts without weights, and all weights by fan-in, those of the last layer too, as the code of
            LDAM-DRW and GLMC has it.

    Input (B, 3, H, W) with H and W divisible by 4, output (B, num_classes).
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        zero_init_residual: bool = False,
        *,
        width: int = 16,
        padded: bool = False,
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stage1 = _stage(width, width, blocks, 1, padded)
        self.stage2 = _stage(width, 2 * width, blocks, 2, padded)
        self.stage3 = _stage(2 * width, 4 * width, blocks, 2, padded)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) or (padded and isinstance(module, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if padded else "fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _stage(inplanes: int, planes: int, blocks: int, stride: int, padded: bool) -> nn.Sequential:
    shortcut: nn.Module | None = None
    if stride != 1 or inplanes != planes:
        shortcut = (
            PaddedShortcut(inplanes, planes)
            if padded
            else nn.Sequential(resnet.conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
        )
    first = BasicBlock(inplanes, planes, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, num_classes: int, zero_init_residual: bool = False) -> nn.Module:
    """The CIFAR-style ResNet of a depth: 8, 20, 32, 44, 56, 110 (thin) or 18, 34, 50 (wide)."""
    if depth in _THIN_DEPTHS:
        return ThinResNet(depth, num_classes, zero_init_residual)
    block, layers = _LAYERS[depth]
    model: nn.Module = ResNet(block, layers, num_classes=num_classes, zero_init_residual=zero_init_residual)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


CIFAR_RESNETS = {f"cifar_resnet{depth}": depth for depth in (*_THIN_DEPTHS, *_LAYERS)}
PADDED_RESNETS: dict[str, Callable[..., nn.Module]] = {
    "cifar_resnet32_pad": partial(ThinResNet, 32, padded=True),
    "cifar_resnet32x4_pad": partial(ThinResNet, 32, width=64, padded=True),
}
