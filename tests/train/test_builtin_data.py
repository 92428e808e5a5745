"""Runs on the data sets that come by name, and what about them is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lesam_dist.data.cifar import load_cifar
from lesam_dist.tasks.images import data, network
from lesam_dist.train.telemetry import read_metrics
from tests.cifar_files import write_cifar
from tests.conftest import Command
from tests.train.test_trainer import assert_same_state, final_state, timeless

CIFAR = """
model: {name: cifar_resnet8}
data: {batch_size: 20, image_size: 32, builtin: cifar100, cutout: 8, cutout_probability: 0.5, crop_padding: 2}
logging: {every_steps: 1, tensorboard: false}
epochs: 2
"""


@pytest.fixture
def cifar(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Flags of a run of 2 epochs of 2 steps on random images of 100 classes."""
    write_cifar(tmp_path / "data", "cifar100", (50, 33), np.random.default_rng(seed), monkeypatch)
    (tmp_path / "cifar.yaml").write_text(CIFAR)
    return "--config", str(tmp_path / "cifar.yaml"), "--data.root", str(tmp_path / "data")


def test_a_run_on_cifar_and_its_resumption(
    command: Command, cifar: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, out, err = command(*cifar, "--run_dir", whole)
    assert (status, err) == (0, "")
    assert "of 33 validation images after epoch 2" in out
    with monkeypatch.context() as patch:
        calls = iter([True, False])
        real = data.CifarLoader.epoch

        def interrupted(self: data.CifarLoader, index: int, start: int = 0) -> object:
            if self._sampling.train and not next(calls):
                raise KeyboardInterrupt
            return real(self, index, start)

        patch.setattr(data.CifarLoader, "epoch", interrupted)
        assert command(*cifar, "--run_dir", broken)[0] == 130
    status, _, err = command(*cifar, "--run_dir", broken, "--resume", "auto")
    assert (status, err) == (0, "")
    assert timeless(broken) == timeless(whole)
    assert_same_state(final_state(broken), final_state(whole))


def test_options_reach_the_loader(cifar: tuple[str, ...], tmp_path: Path) -> None:
    from lesam_dist.config.command_line import parse
    from lesam_dist.parallel.processes import Distributed

    world = Distributed(1, 1, 2, torch.device("cpu"))
    flags = ("--data.mean", "[0.1,0.2,0.3]", "--data.horizontal_flip", "false", "--data.eval_batch_size", "10")
    config = parse([*cifar, *flags])
    splits = load_cifar("cifar100", tmp_path / "data")
    train, val = data.build_loaders(config, splits, world)
    assert isinstance(train, data.CifarLoader)
    assert train._transform == data.CifarTransform(32, 2, False, 8, 0.5, mean=(0.1, 0.2, 0.3))
    assert (train._sampling.rank, train._sampling.world_size, train._sampling.batch_size) == (1, 2, 20)
    assert [len(labels) for _, labels in train.epoch(0)] == [10, 10]
    assert [len(labels) for _, labels in val.epoch(0)] == [10, 7]


def test_a_run_on_noisy_digits(command: Command, tmp_path: Path) -> None:
    flags = ("--config", "digits", "--data.builtin", "digits_noisy", "--data.root", tmp_path / "data", "--epochs", "1")
    flags += ("--schedule.anneal_start_epoch", "null", "--run_dir", tmp_path / "run", "--data.backend", "torchvision")
    status, out, err = command(*map(str, flags))
    assert (status, err) == (0, "")
    assert f"data.builtin digits_noisy: wrote scikit-learn's digits to data.root '{tmp_path / 'data'}'\n" in out
    assert "of 359 validation images" in out
    assert read_metrics(tmp_path / "run")[-1]["step"] == 300 // 32


REFUSED = [
    (["--data.random_area", "[0.5,1.0]"], "data.random_area is (0.5, 1.0) but data.builtin is cifar100: only class"),
    (["--data.random_aspect_ratio", "[1,1]"], "Leave it at (0.75, 1.333"),
    (["--data.builtin", "null"], "data.crop_padding is 2 but data.builtin is null: only cifar10 and cifar100"),
    (["--data.builtin", "digits", "--data.crop_padding", "4"], "data.cutout is 8 but data.builtin is digits"),
    (["--data.cutout", "40"], "cutout is 40: it must be at least 0 and at most the image, 32 pixels"),
    (["--data.cutout_probability", "2"], "cutout_probability is 2.0"),
    (["--data.crop_padding", "-1"], "crop_padding is -1"),
    (["--data.batch_size", "60"], "has 50 training images, fewer than one global batch of 60"),
    (["--data.root", "null"], "data.root is not set: give the folder that holds cifar100"),
    (["--model.pretrained", "true"], "torchvision has no weights of 'cifar_resnet8'"),
    (["--model.num_classes", "10"], "has 100 classes but model.num_classes is 10"),
]


@pytest.mark.parametrize("recipe", ["digits", "digits_noisy", "mnist5k", "cifar10_resnet18_sam"])
def test_somebodys_images_are_not_replaced(command: Command, images: Path, tmp_path: Path, recipe: str) -> None:
    """A recipe of a built-in data set trained digits, or CIFAR, where a user pointed it at photographs."""
    before = sorted(images.rglob("*"))
    status, _, err = command("--config", recipe, "--data.root", images, "--run_dir", tmp_path / "run")
    assert status == 2
    assert str(images) in err
    assert "choose another folder" in err
    assert sorted(images.rglob("*")) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_refusals(command: Command, cifar: tuple[str, ...], tmp_path: Path, flags: list[str], message: str) -> None:
    status, _, err = command(*cifar, "--run_dir", tmp_path / "run", *flags)
    assert status == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_needs_no_pretrained_weights(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str) -> None:
        raise AssertionError(f"weights of {name} were fetched")

    monkeypatch.setattr(network, "fetch_weights", fetch)
    flags = ("--model.name", "mobilenet_v3_small", "--model.pretrained", "true", "--data.batch_size", "2")
    assert command(*flags, "--data.image_size", "32", "--dry_run")[0] == 0
