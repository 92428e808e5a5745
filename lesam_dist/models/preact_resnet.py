"""Pre-activation ResNet-18 for 32 x 32 images, as the literature on adversarial robustness has it.

He et al., "Identity Mappings in Deep Residual Networks" (2016), in the widths of ImageNet's ResNet-18: a 3x3
convolution to 64 channels, four stages of two blocks with 64, 128, 256 and 512 channels, BatchNorm, ReLU, global
average. Where a stage begins with another number of channels, the shortcut is a 1x1 convolution, without BatchNorm, of
the first ReLU's output. 11.17 M parameters with ten classes. This is the network of Rice et al. (2020), Wu et al. (AWP,
2020) and Zhang et al. (2024), whose code Table 5 of the paper follows; other code lacks the last BatchNorm.

As in that code, PyTorch's own initialisation.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import conv3x3

from lesam_dist.models.wide_resnet import WideBlock

_PLANES = (64, 128, 256, 512)


class PreActResNet18(nn.Module):
    """Input (B, 3, H, W) with H and W divisible by 8, output (B, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = conv3x3(3, _PLANES[0])
        stages, inplanes = [], _PLANES[0]
        for planes in _PLANES:
            stride = 1 if planes == inplanes else 2
            stages.append(nn.Sequential(WideBlock(inplanes, planes, stride), WideBlock(planes, planes, 1)))
            inplanes = planes
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(inplanes)
        self.fc = nn.Linear(inplanes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stages(self.stem(x))), inplace=True)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
