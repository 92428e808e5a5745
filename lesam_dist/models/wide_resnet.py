"""Wide ResNets for 32 x 32 images: Zagoruyko and Komodakis, "Wide Residual Networks" (2016), Table 1.

Depth 6n + 4 and width k: a 3x3 convolution to 16 channels, three stages of n blocks with 16k, 32k and 64k channels,
BatchNorm, ReLU, global average. Blocks are the paper's B(3,3) with BatchNorm and ReLU before each convolution. Where
the number of channels changes, the shortcut is a 1x1 convolution of the first ReLU's output. WRN-28-10 has 36.5 M
parameters (the paper's Table 4).

As in the authors' code: no bias in convolutions, He initialisation by fan-out, a zero bias in the last layer. There is
no dropout.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import conv1x1, conv3x3


class WideBlock(nn.Module):
    """(B, inplanes, H, W) to (B, planes, H / stride, W / stride). Any pre-activation ResNet's of two convolutions."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.shortcut = conv1x1(inplanes, planes, stride) if inplanes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A WRN-``depth``-``width``.

    Args:
        depth: 6n + 4 for n blocks a stage.
        width: factor on 16, 32 and 64 channels.
        num_classes: size of the last layer.

    Input (B, 3, H, W) with H and W divisible by 4, output (B, num_classes).
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks, planes = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.stem = conv3x3(3, planes[0])
        self.stage1 = _stage(planes[0], planes[1], blocks, stride=1)
        self.stage2 = _stage(planes[1], planes[2], blocks, stride=2)
        self.stage3 = _stage(planes[2], planes[3], blocks, stride=2)
        self.bn = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        x = F.relu(self.bn(x), inplace=True)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _stage(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (WideBlock(planes, planes, 1) for _ in range(blocks - 1))
    return nn.Sequential(WideBlock(inplanes, planes, stride), *rest)
