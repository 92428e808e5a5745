"""timm's models by name: as timm builds them, for the images and classes of the run, in units that FSDP2 gathers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lesam_dist.errors import UserError
from lesam_dist.models import build_model, require_model
from lesam_dist.parallel.blocks import find_blocks, recompute_in_backward
from tests.conftest import Command

# A model of each family whose blocks are known, and their number: the depths of the papers, summed over stages.
BLOCKS = {
    "cait_xxs24_224": 24,
    "convnext_atto": 2 + 2 + 6 + 2,
    "eva02_tiny_patch14_224": 12,
    "gmixer_12_224": 12,
    "gmlp_ti16_224": 30,
    "hiera_tiny_224": 1 + 2 + 7 + 2,
    "maxvit_tiny_tf_224": 2 + 2 + 5 + 2,
    "poolformer_s12": 12,
    "resnet50": 3 + 4 + 6 + 3,
    "resnetv2_50": 3 + 4 + 6 + 3,
    "swin_tiny_patch4_window7_224": 2 + 2 + 6 + 2,
    "swinv2_tiny_window8_256": 2 + 2 + 6 + 2,
    "vit_tiny_patch16_224": 12,
    "xcit_nano_12_p16_224": 12,
}
USUAL = ("convnext_atto", "resnet50", "vit_tiny_patch16_224")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.full) for n in BLOCKS])
def test_blocks_are_known(name: str) -> None:
    with torch.device("meta"):
        blocks = find_blocks(timm.create_model(name))
    assert len(blocks) == BLOCKS[name]
    inside = {id(p) for block in blocks for p in block.parameters()}
    assert len(inside) == sum(1 for block in blocks for _ in block.parameters()), "nested"


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_maxvit", "test_efficientnet"])
def test_for_these_images_and_classes(seed: int, name: str) -> None:
    """And as timm itself makes it, from the same random numbers, wherever the size does not matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(f"timm/{name}", 7, image_size=64)
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    torch.manual_seed(seed)
    options = {"img_size": 64} if name in ("test_vit", "test_maxvit") else {}  # their embeddings of positions
    own = timm.create_model(name, num_classes=7, **options).state_dict()
    assert own.keys() == model.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())


def test_stochastic_depth_is_timms() -> None:
    drops = [m.drop_prob for m in build_model("timm/test_vit", 7, drop_path=0.3).modules() if hasattr(m, "drop_prob")]
    assert max(drops) == pytest.approx(0.3)
    assert not any(hasattr(m, "drop_prob") for m in build_model("timm/test_vit", 7).modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/resnet51", {}, "unknown model 'timm/resnet51': did you mean 'timm/resnet"),
        (
            "timm/resnet50.a1_in1k",
            {},
            "names pretrained weights, 'a1_in1k', which are not loaded: give 'timm/resnet50'",
        ),
        ("timm/resnet50", {"pretrained": True}, "timm's weights of 'timm/resnet50' are not loaded here: set"),
        ("timm/resnet50", {"zero_init_residual": True}, "has no option zero_init_residual"),
        ("timm/vgg11", {"drop_path": 0.1}, r"'timm/vgg11' cannot be built with {'drop_path_rate': 0.1}"),
        ("timm/nest_tiny", {"image_size": 100}, "cannot be built for image_size 100 and 7 classes: First level blocks"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, 7, **options)


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"'timm/resnet18' is one of timm's, .*: pip install 'lesam-dist\[timm\]'\.$"):
        require_model("timm/resnet18")


def test_trains(command: Command) -> None:
    small = ("--data.image_size", "32", "--data.batch_size", "4", "--parallel.device", "cpu", "--dry_run")
    status, out, err = command(
        "--config", "digits", "--model.name", "timm/test_vit", "--model.drop_path", "0.5", *small
    )
    assert (status, err) == (0, "")
    assert out.count("[train]") == 2


def test_recomputing_changes_no_bit(seed: int) -> None:
    """With stochastic depth, whose masks are drawn again."""
    torch.manual_seed(seed)
    model = build_model("timm/test_vit", 7, image_size=32, drop_path=0.5).train()
    x, grads = torch.randn(4, 3, 32, 32), []
    for recompute in (False, True):
        if recompute:
            recompute_in_backward(model)
        torch.manual_seed(seed)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)
