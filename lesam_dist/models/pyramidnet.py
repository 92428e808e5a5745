"""Additive PyramidNets for 32 x 32 images: Han, Kim and Kim, "Deep Pyramidal Residual Networks" (2017).

Depth 6n + 2 and widening factor alpha: every one of the N = 3n blocks adds alpha / N channels to the 16 of the first
convolution (the paper's Eq. 2; rounded as in the authors' code, which changes nothing where N divides alpha). In a
block come BatchNorm, convolution, BatchNorm, ReLU, convolution, BatchNorm (the paper's Section 3.3). The shortcut has
no parameters: it is averaged 2 x 2 where the block strides, and padded with zero channels.

As in the authors' code: no bias in convolutions, He initialisation by fan-out, BatchNorm but no ReLU behind the first
convolution. PyramidNet-110 with alpha 270 has 28.5 M parameters.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import conv3x3


class PyramidBlock(nn.Module):
    """(B, inplanes, H, W) to (B, planes, ceil(H / stride), ceil(W / stride)), with planes >= inplanes."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn3 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.padding = planes - inplanes

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.bn3(self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x))), inplace=True)))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)  # as the convolution rounds an odd side
        return residual + F.pad(x, (0, 0, 0, 0, 0, self.padding))


class PyramidNet(nn.Module):
    """An additive PyramidNet of basic blocks.

    Args:
        depth: 6n + 2 for n blocks a stage.
        alpha: channels that all blocks together add.
        num_classes: size of the last layer.

    Input (B, 3, H, W), output (B, num_classes).
    """

    def __init__(self, depth: int, alpha: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        planes = [16 + round(alpha * k / (3 * blocks)) for k in range(3 * blocks + 1)]
        self.conv1 = conv3x3(3, planes[0])
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.blocks = nn.Sequential(
            *(
                PyramidBlock(inplanes, outplanes, stride=2 if k in (blocks, 2 * blocks) else 1)
                for k, (inplanes, outplanes) in enumerate(itertools.pairwise(planes))
            )
        )
        self.bn2 = nn.BatchNorm2d(planes[-1])
        self.fc = nn.Linear(planes[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(x), inplace=True)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
