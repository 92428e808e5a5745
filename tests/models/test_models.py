"""Networks by name: shapes, parameter counts of the literature, and clear refusals."""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.errors import UserError
from lesam_dist.models import build_model, model_names, require_input
from lesam_dist.models.cifar_resnet import PaddedShortcut
from lesam_dist.models.pretrained import last_layer
from lesam_dist.models.pyramidnet import PyramidBlock
from lesam_dist.models.wide_resnet import WideBlock
from lesam_dist.parallel.blocks import find_blocks

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


# ---- the paper's networks: every parameter of the layer tables -------------------------------------------------------


def conv3(inplanes: int, planes: int) -> int:
    return 9 * inplanes * planes


def bn(planes: int) -> int:
    return 2 * planes


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def resnet18(classes: int) -> int:
    count = conv3(3, 64) + bn(64)
    for inplanes, planes in ((64, 64), (64, 128), (128, 256), (256, 512)):
        count += conv3(inplanes, planes) + 3 * conv3(planes, planes) + 4 * bn(planes)  # two blocks of two convolutions
        count += inplanes * planes + bn(planes) if inplanes != planes else 0
    return count + linear(512, classes)


def wide_resnet28_10(classes: int) -> int:
    count = conv3(3, 16)
    for inplanes, planes in ((16, 160), (160, 320), (320, 640)):
        count += conv3(inplanes, planes) + 7 * conv3(planes, planes) + inplanes * planes  # four blocks and a shortcut
        count += bn(inplanes) + 7 * bn(planes)  # before each convolution
    return count + bn(640) + linear(640, classes)


def preact_resnet18(classes: int) -> int:
    count = conv3(3, 64) + bn(512)
    for inplanes, planes in ((64, 64), (64, 128), (128, 256), (256, 512)):
        count += conv3(inplanes, planes) + 3 * conv3(planes, planes)  # two blocks of two convolutions
        count += bn(inplanes) + 3 * bn(planes)  # before each convolution
        count += inplanes * planes if inplanes != planes else 0
    return count + linear(512, classes)


def pyramidnet110_270(classes: int) -> int:
    count = conv3(3, 16) + bn(16)
    for planes in range(16, 286, 5):  # 54 blocks, each of 270 / 54 channels more
        wider = planes + 5
        count += bn(planes) + conv3(planes, wider) + bn(wider) + conv3(wider, wider) + bn(wider)
    return count + bn(286) + linear(286, classes)


def padded_resnet32(width: int, classes: int) -> int:
    """Fifteen blocks of two convolutions, shortcuts without parameters."""
    count = conv3(3, width) + bn(width)
    for inplanes, planes in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        count += conv3(inplanes, planes) + 9 * conv3(planes, planes) + 10 * bn(planes)
    return count + linear(4 * width, classes)


def vit_16(width: int, classes: int) -> int:
    mlp, patch, tokens = 4 * width, 16, 14 * 14 + 1
    block = 2 * bn(width) + linear(width, 3 * width) + linear(width, width) + linear(width, mlp) + linear(mlp, width)
    return linear(3 * patch * patch, width) + (1 + tokens) * width + 12 * block + bn(width) + linear(width, classes)


# Name, layers, blocks, and the millions of the literature with their printed digits: ResNet-18 and WRN-28-10 of
# Zagoruyko and Komodakis (2016), Table 4, PyramidNet as counted since (its own paper says 28.3), torchvision's ViT, and
# DeiT-S as timm counts it (22.05; its paper says 22). He et al. (2016) have 0.46 for ResNet-32 and 10 classes.
NETWORKS: list[tuple[str, Callable[[int], int], int, int, str]] = [
    ("cifar_resnet18", resnet18, 8, 100, "11.2"),
    ("wide_resnet28_10", wide_resnet28_10, 12, 10, "36.5"),
    ("wide_resnet28_10", wide_resnet28_10, 12, 100, "36.5"),
    ("preact_resnet18", preact_resnet18, 8, 10, "11.2"),
    ("pyramidnet110_270", pyramidnet110_270, 54, 100, "28.5"),
    ("cifar_resnet32_pad", partial(padded_resnet32, 16), 15, 100, "0.5"),
    ("cifar_resnet32x4_pad", partial(padded_resnet32, 64), 15, 100, "7.4"),
    ("vit_b_16", partial(vit_16, 768), 12, 1000, "86.6"),
    ("vit_s_16", partial(vit_16, 384), 12, 1000, "22.1"),
]


@pytest.mark.parametrize(("name", "layers", "blocks", "classes", "millions"), NETWORKS)
def test_every_parameter_is_accounted_for(
    name: str, layers: Callable[[int], int], blocks: int, classes: int, millions: str
) -> None:
    with torch.device("meta"):
        model = build_model(name, classes)
    count = sum(p.numel() for p in model.parameters())
    assert count == layers(classes)
    assert f"{count / 1e6:.1f}" == millions
    found = find_blocks(model)
    assert len(found) == blocks
    inside = {id(p) for block in found for p in block.parameters()}
    assert len(inside) == sum(1 for block in found for _ in block.parameters()), "nested"
    side = 224 if name.startswith("vit") else 32
    assert model.eval()(torch.zeros(2, 3, side, side, device="meta")).shape == (2, classes)


@pytest.mark.parametrize("name", ["cifar_resnet18", "wide_resnet28_10", "pyramidnet110_270"])
def test_initialisation_is_hes_by_fan_out(seed: int, name: str) -> None:
    """Standard deviation sqrt(2 / (9 planes)), no bias in convolutions, BatchNorm the identity."""
    model = build_model(name, 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            weight = module.weight.detach()
            expected = math.sqrt(2 / (weight[0, 0].numel() * weight.shape[0]))
            # Of n normal numbers, the deviation is off by 1 / sqrt(2 n) and the mean by 1 / sqrt(n), relatively.
            slack = 6 / math.sqrt(weight.numel())
            assert float(weight.std()) == pytest.approx(expected, rel=slack)
            assert abs(float(weight.mean())) < slack * expected
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.unique().tolist() == [1]
            assert module.bias.unique().tolist() == [0]
    if name == "wide_resnet28_10":
        assert model.fc.bias.unique().tolist() == [0]  # type: ignore[union-attr]


def randomise(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    return module.eval()  # BatchNorm: the statistics of N(0, 1)


def normalised(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    return x / (1 + layer.eps) ** 0.5 * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize(("inplanes", "planes", "stride"), [(3, 5, 1), (3, 5, 2), (4, 4, 1)])
def test_wide_block(seed: int, inplanes: int, planes: int, stride: int) -> None:
    block, x = randomise(WideBlock(inplanes, planes, stride)), torch.randn(2, inplanes, 8, 8)
    active = normalised(x, block.bn1).relu()
    y = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    y = F.conv2d(normalised(y, block.bn2).relu(), block.conv2.weight, padding=1)
    shortcut = x if inplanes == planes else F.conv2d(active, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), y + shortcut)


@pytest.mark.parametrize("side", [8, 7])
def test_padded_shortcut(seed: int, side: int) -> None:
    x = torch.randn(2, 4, side, side)
    y = PaddedShortcut(4, 8)(x)
    assert y.shape == (2, 8, (side + 1) // 2, (side + 1) // 2)
    for channel in range(8):
        expected = x[:, channel - 2, ::2, ::2] if 2 <= channel < 6 else torch.zeros_like(y[:, 0])
        assert torch.equal(y[:, channel], expected)


def test_padded_networks_start_by_fan_in(seed: int) -> None:
    """Standard deviation sqrt(2 / inputs), of the last layer too."""
    model = build_model("cifar_resnet32_pad", 100)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 32
    for layer in layers:
        weight = layer.weight.detach()
        assert float(weight.std()) == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=6 / math.sqrt(weight.numel()))


@pytest.mark.parametrize(("side", "stride"), [(8, 1), (8, 2), (7, 2)])
def test_pyramid_block(seed: int, side: int, stride: int) -> None:
    """No ReLU before the first convolution, BatchNorm behind the last, a shortcut without parameters."""
    block, x = randomise(PyramidBlock(3, 5, stride)), torch.randn(2, 3, side, side)
    y = F.conv2d(normalised(x, block.bn1), block.conv1.weight, stride=stride, padding=1)
    y = normalised(F.conv2d(normalised(y, block.bn2).relu(), block.conv2.weight, padding=1), block.bn3)
    for row, column in itertools.product(range(y.shape[2]), range(y.shape[3])):
        window = x[:, :, stride * row : stride * (row + 1), stride * column : stride * (column + 1)]
        y[:, :3, row, column] += window.mean(dim=(2, 3))
    torch.testing.assert_close(block(x), y)


# ---- options ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="'pyramidnet110_270' has no option zero_init_residual"):
        build_model("pyramidnet110_270", 10, zero_init_residual=True)


# ---- pretrained weights ----------------------------------------------------------------------------------------------

FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "mnasnet0_5", "mobilenet_v2", "vgg11"]
FAMILIES += ["mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t"]
FAMILIES += ["maxvit_t", "vit_b_16"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_is_all_that_depends_on_the_classes(name: str) -> None:
    # Two of them read numbers from tensors while they are built.
    with torch.device("cpu" if name in ("maxvit_t", "regnet_y_400mf") else "meta"):
        few, many = build_model(name, 7), build_model(name, 1000)
    sizes = {key: value.shape for key, value in many.state_dict().items()}
    differing = {key for key, value in few.state_dict().items() if value.shape != sizes[key]}
    assert differing == {key for key in sizes if key.startswith(f"{last_layer(few)}.")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch hub's cache, empty, and no network."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def put(cache: Path, name: str) -> dict[str, Tensor]:
    """Random weights where the cache has the pretrained ones."""
    options = {"init_weights": False} if name == "googlenet" else {}  # else it warns
    state: dict[str, Tensor] = torchvision.models.get_model(name, **options).state_dict()
    for key, value in state.items():  # in place: the dict has an attribute with the versions of its modules
        state[key] = torch.rand_like(value) if value.is_floating_point() else value
    torch.save(state, cache / os.path.basename(torchvision.models.get_model_weights(name).DEFAULT.url))
    return state


@pytest.mark.parametrize(
    ("name", "classes"), [("vit_b_16", 100), ("mobilenet_v3_small", 1000), ("googlenet", 7), ("mnasnet0_5", 7)]
)
def test_pretrained_weights_under_a_fresh_last_layer(cache: Path, seed: int, name: str, classes: int) -> None:
    """Also for as many classes as ImageNet has: they are others."""
    saved = put(cache, name)
    torch.manual_seed(seed)
    fresh = build_model(name, classes).state_dict()
    torch.manual_seed(seed)
    model = build_model(name, classes, pretrained=True)
    head = last_layer(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if key.startswith(f"{head}.") else saved[key]), key
    assert fresh[f"{head}.weight"].shape[0] == classes
    assert name != "googlenet" or model.transform_input, "these weights want images normalised in another way"


def test_pretrained_weights_that_cannot_be_had(cache: Path) -> None:
    file = cache / "mobilenet_v3_small-047dcff4.pth"
    remedy = rf"put https://download.pytorch.org/models/{file.name} there \(.*TORCH_HOME.*model.pretrained to false"
    with pytest.raises(UserError, match=rf"are not in '{file}' and cannot be .*no network.*: {remedy}"):
        build_model("mobilenet_v3_small", 7, pretrained=True)
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match=rf"in '{file}' cannot be read .*: remove that file and {remedy}"):
        build_model("mobilenet_v3_small", 7, pretrained=True)
    with pytest.raises(
        UserError, match=r"model\.pretrained is true but torchvision has no weights of 'cifar_resnet18'"
    ):
        build_model("cifar_resnet18", 7, pretrained=True)


def test_densenets_old_names_are_read(cache: Path) -> None:
    """Its weights name `norm.1` what torchvision's DenseNet now names `norm1`."""
    saved = put(cache, "densenet121")
    counted = {key: value for key, value in saved.items() if not key.endswith("num_batches_tracked")}  # younger
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value for key, value in counted.items()}
    assert old.keys() != counted.keys()
    torch.save(old, next(cache.glob("densenet121*")))
    model = build_model("densenet121", 7, pretrained=True)
    for key, value in model.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(value, saved[key]), key


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_poisoned_pretrained_weights_run_no_code(cache: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    state = put(cache, "mobilenet_v3_small")
    torch.save({**state, "more": Code(evidence)}, next(cache.glob("mobilenet*")))
    with pytest.raises(UserError, match=r"mobilenet_v3_small-047dcff4.pth' cannot be read \(Weights only load failed"):
        build_model("mobilenet_v3_small", 7, pretrained=True)
    assert not evidence.exists()


def test_pretrained_weights_of_another_network(cache: Path) -> None:
    put(cache, "mobilenet_v2")
    next(cache.glob("mobilenet_v2*")).rename(cache / "mobilenet_v3_small-047dcff4.pth")
    with pytest.raises(UserError, match=r"'mobilenet_v3_small' .*are those of another network.*remove that file, or"):
        build_model("mobilenet_v3_small", 7, pretrained=True)


def test_pretrained_weights_of_another_image_size(cache: Path) -> None:
    put(cache, "vit_b_16")
    with pytest.raises(UserError, match=r"'encoder.pos_embedding' is \(1, 5, 768\), .*set data.image_size to 224, or"):
        build_model("vit_b_16", 7, image_size=32, pretrained=True)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "cifar_resnet8", "squeezenet1_1"])
def test_what_a_model_can_be_trained_on_is_known_without_computing(seed: int, name: str) -> None:
    """As a forward on real images finds, which also moves BatchNorm's statistics and takes random numbers."""
    model = build_model(name, 7).train()
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}

    def foreseen(batch_size: int, image_size: int) -> bool:
        try:
            require_input(model, name, batch_size, image_size)
        except UserError:
            return False
        return True

    def real(batch_size: int, image_size: int) -> bool:
        try:
            copy.deepcopy(model)(torch.randn(batch_size, 3, image_size, image_size))
        except (RuntimeError, ValueError):
            return False
        return True

    sizes = list(itertools.product((1, 2), (16, 32, 64)))
    random_state = torch.get_rng_state()
    outcomes = [foreseen(*size) for size in sizes]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())
    assert outcomes == [real(*size) for size in sizes]
    assert all(outcomes) == (name == "cifar_resnet8")
