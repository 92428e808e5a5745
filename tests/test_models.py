"""Networks by name: shapes, parameter counts of the literature, and clear refusals."""

from __future__ import annotations

import pytest
import torch

from lesam_dist.errors import UserError
from lesam_dist.models import build_model, model_names

# He et al. (2016), Table 6 gives 0.27 M to 1.7 M for the thin ones; a 1x1 shortcut adds 2,560 weights and 192 BatchNorm
# parameters to each. The wide ones are 11.2 M (ResNet-18 on CIFAR) and its siblings.
MILLIONS = {"cifar_resnet20": 0.27, "cifar_resnet32": 0.46, "cifar_resnet44": 0.66, "cifar_resnet56": 0.85}
MILLIONS |= {"cifar_resnet110": 1.7, "cifar_resnet18": 11.2, "cifar_resnet34": 21.3, "cifar_resnet50": 23.5}


@pytest.mark.parametrize("name", MILLIONS)
def test_cifar_resnets(name: str) -> None:
    model = build_model(name, 10)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name], rel=0.03)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_resnet18", "resnet18"])
def test_zero_init_residual_makes_blocks_the_identity(seed: int, name: str) -> None:
    model = build_model(name, 10, zero_init_residual=True).eval()
    stage = model.stage1 if name == "cifar_resnet8" else model.layer1
    x = torch.rand(1, stage[0].conv1.in_channels, 8, 8)
    assert torch.equal(stage[0](x), x)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "mobilenet_v3_small", "googlenet"])
def test_torchvision_models(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, 7, image_size=64) if name != "googlenet" else None
    model = model or build_model(name, 7)
    out = model.eval()(torch.zeros(2, 3, 64, 64, device=next(model.parameters()).device))
    assert out.shape == (2, 7)


def test_every_torchvision_classifier_is_there() -> None:
    assert {"resnet101", "convnext_tiny", "efficientnet_b0", "swin_t", "vit_l_16", "regnet_y_400mf"} <= set(
        model_names()
    )
    assert not [name for name in model_names() if "segment" in name or "rcnn" in name or "video" in name]


def test_refusals() -> None:
    with pytest.raises(UserError, match="unknown model 'resnet51': did you mean 'resnet"):
        build_model("resnet51", 10)
    with pytest.raises(UserError, match="image_size 50"):
        build_model("vit_b_16", 10, image_size=50)
