"""Recipes step, some with a smaller network in place of their own; and each network fits its recipe's images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.config.recipes import bases, compose_parts
from lesam_dist.models import build_model
from tests.conftest import Command


@pytest.mark.parametrize(
    ("name", "millions", "flags"),
    [
        ("digits", "0.08", ""),
        ("digits_noisy_resnet8_esam", "0.08", ""),
        ("cifar10_resnet18_sgd", "11.17", ""),
        ("cifar100_resnet18_lesam", "11.22", ""),
        ("imagenet_resnet50_lesam", "25.56", ""),
        ("imagenet_vit_s16_lesam", "21.98", ""),  # 22.05 less the embeddings of 192 positions
        # The others of these kinds in a smaller network. A batch of 6, since each image is in it three times.
        ("imagenet_resnet50_a2_lesam", "0.14", "--model.name cifar_resnet8 --data.batch_size 6"),
        ("imagenet_resnet50_b16k_sam", "0.14", "--model.name cifar_resnet8"),
        ("imagenet_resnet50_b32k_lars_looksam", "0.14", "--model.name cifar_resnet8"),
        ("imagenet_vit_l16_lesam", "0.37", "--model.name timm/test_vit"),  # blocks gathered in bf16 and recomputed
    ],
)
def test_dry_run(
    command: Command, name: str, millions: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reduced = ["--data.image_size", "32", "--data.batch_size", "2", *flags.split(), "--dry_run"]
    reduced += [] if name.startswith("cifar") else ["--data.val_resize", "32"]
    status, out, err = command("--config", name, *reduced)
    assert (status, err) == (0, "")
    assert f"({millions} M parameters)" in out, "the last layer is as large as with the data"
    assert out.count("[train]") == 2
    assert out.count("[val]") == 1
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_a_dry_run_on_a_cpu_is_small_unless_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--data.image_size", "32", "--data.val_resize", "32", "--parallel.device", "cpu", "--dry_run"]
    flags += ["--model.name", "cifar_resnet8"]
    status, out, _ = command("--config", "imagenet_resnet50_lesam", *flags)
    assert status == 0
    assert "dry run on a CPU: batch 4 for 512, fp32 for bf16" in out
    assert "fp32, 1 x cpu, batch 4" in out
    status, out, _ = command(
        "--config", "imagenet_resnet50_lesam", *flags, "--data.batch_size", "6", "--precision.compute", "bf16"
    )
    assert status == 0
    assert "bf16, 1 x cpu, batch 6" in out


def test_a_dry_run_goes_on_from_nothing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line of a run that resumes, tried out: it ended in an AssertionError once."""
    monkeypatch.chdir(tmp_path)
    status, out, err = command("--config", "digits", "--data.batch_size", "2", "--dry_run", "--resume", "auto")
    assert (status, err, out.count("[train]")) == (0, "", 2)
    assert list(tmp_path.iterdir()) == []


# One recipe of each network and size of images.
NETWORKS = {(str(c["model"]["name"]), c["data"]["image_size"]): b for b in bases() for c in [compose_parts(b, "sgd")]}


@pytest.mark.parametrize("base", NETWORKS.values())
def test_the_model_fits_the_data(base: str) -> None:
    """Shapes alone: nothing is computed."""
    config = parse(["--config", f"{base}_sgd"])
    with torch.device("meta"):
        model = build_model(config.model.name, 10, image_size=config.data.image_size).eval()
        side = config.data.image_size
        assert model(torch.empty(2, 3, side, side)).shape == (2, 10)
