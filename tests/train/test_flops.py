"""Operations of a model's passes: counted by hand, and for a grouped convolution by what its dense form computes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import PrecisionConfig
from lesam_dist.train import flops
from lesam_dist.train.flops import count, flops_of, peak_of

CPU = torch.device("cpu")


def on_meta(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).to("meta")


def test_a_network_counted_by_hand(seed: int) -> None:
    """Each output of a layer is a product with its weights; backward makes two such products, at the first layer one,
    since nobody asks for the gradient of the images."""
    draw = random.Random(seed)
    size, wide, groups, classes = draw.choice([8, 12, 16]), 4 * draw.randint(1, 3), draw.choice([1, 2, 4]), 5
    net = on_meta(
        nn.Conv2d(3, wide, 3, padding=1),
        nn.BatchNorm2d(wide),
        nn.ReLU(),
        nn.Conv2d(wide, 2 * wide, 3, stride=2, padding=1, groups=groups),
        nn.ConvTranspose2d(2 * wide, wide, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(wide, classes),
    )
    first = 2 * size**2 * wide * 3 * 9
    half = (size // 2) ** 2
    others = 2 * half * 2 * wide * (wide // groups) * 9 + 2 * half * 2 * wide * wide * 4 + 2 * wide * classes
    assert count(net, size) == (first + others, first + 2 * others)


def test_resnet50_is_what_everybody_says() -> None:
    """4.09 billion multiplications and additions a forward; less than two forwards a backward, by the first layer's."""
    config = parse(["--config", "imagenet_resnet50_lesam", "--logging.peak_tflops", "3"])
    found = flops_of(config, 1000, CPU)
    assert found is not None
    assert found.forward / 2e9 == pytest.approx(4.09, abs=0.005)
    assert found.backward == pytest.approx(2 * found.forward - 2 * 112**2 * 64 * 3 * 49, rel=1e-6)
    assert found.peak == 3


def test_counting_changes_nothing_that_is_drawn_later(seed: int) -> None:
    before = torch.get_rng_state()
    config = parse(["--config", "digits", "--logging.peak_tflops", "1"])
    assert flops_of(config, 10, CPU) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cpu_is_not_asked_without_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "count", lambda *_: pytest.fail("it takes a second"))
    assert flops_of(parse(["--config", "digits"]), 10, CPU) is None


@pytest.mark.parametrize(
    ("name", "compute", "tf32", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989),
        ("NVIDIA H100 PCIe", "fp16", True, 756),
        ("NVIDIA H100 NVL", "fp32", True, 418),
        ("NVIDIA H200", "fp32", False, 67),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156),
        ("NVIDIA A100-PCIE-40GB", "bf16", True, 312),
        ("NVIDIA B200", "bf16", False, 2250),
        ("NVIDIA GB200", "bf16", True, None),  # another one
        ("NVIDIA GeForce RTX 4090", "bf16", True, None),
    ],
)
def test_peaks(name: str, compute: str, tf32: bool, expected: float | None) -> None:
    assert peak_of(name, PrecisionConfig(compute=compute, tf32=tf32)) == expected  # type: ignore[arg-type]
