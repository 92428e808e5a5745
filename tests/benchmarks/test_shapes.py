"""Parameter lists and networks of the benchmarks against torchvision's models and published counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision
from lib import shapes
from lib.models import ResNet, ViT
from torch import Tensor, nn

# Published parameter counts; WRN-28-10's is that for CIFAR-100.
COUNTS = {"resnet50": 25.56, "resnet101": 44.55, "wrn_28_10": 36.5, "vit_b_16": 86.57, "vit_l_16": 304.33}


@pytest.mark.parametrize(("name", "millions"), COUNTS.items())
def test_published_counts(name: str, millions: float) -> None:
    digits = len(str(millions).split(".")[1])
    assert round(shapes.numel(shapes.MODELS[name]()) / 1e6, digits) == millions


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "vit_b_16", "vit_l_16"])
def test_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    assert shapes.MODELS[name]() == [tuple(p.shape) for p in model.parameters()]


def test_lists_for_extremes() -> None:
    small, large = (shapes.MODELS[name]() for name in ("small1000", "large"))
    assert len(small) == 1000
    assert max(shape[0] for shape in small) <= 4096
    assert len(large) < 10
    assert shapes.numel(large) > 1e8


def test_resnet_computes_what_torchvisions_does(seed: int) -> None:
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=7)
    ours = ResNet((2, 1, 1, 1), classes=7)
    copy_parameters(ours.parameters(), theirs.parameters())
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_vit_computes_what_torchvisions_does(seed: int) -> None:
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=128, num_classes=7
    )
    nn.init.normal_(theirs.heads.head.weight)  # zero at first
    ours = ViT(2, 32, 4, image=32, classes=7)
    copy_parameters(ours.parameters(), theirs.parameters())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def copy_parameters(to: Iterator[Tensor], of: Iterator[Tensor]) -> None:
    for target, source in zip(to, of, strict=True):
        target.copy_(source)
