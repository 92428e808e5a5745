"""Every recipe builds and steps, and those of the paper hold the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesam_dist.train.cli import dump, parse, recipes
from lesam_dist.train.config import Config
from tests.train.conftest import Command


def test_the_recipes_are_found() -> None:
    assert {"digits", "imagenet_resnet50_lesam", "imagenet_resnet101_lesam"} <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_dry_run(command: Command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reduced = ("--data.image_size", "32", "--data.val_resize", "32", "--data.batch_size", "2", "--dry_run")
    status, out, err = command("--config", name, *reduced)
    assert (status, err) == (0, "")
    assert out.count("[train]") == 2
    assert out.count("[val]") == 1
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


@pytest.mark.parametrize("name", recipes())
def test_dumped_config_reads_back(name: str, tmp_path: Path) -> None:
    config = parse(["--config", name, "--optimizer.rho_max", "null", "--seed", "5"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    assert config != Config()


@pytest.mark.parametrize("depth", [50, 101])
def test_imagenet_recipes_hold_table_9(depth: int) -> None:
    config = parse(["--config", f"imagenet_resnet{depth}_lesam"])
    assert config.model.name == f"resnet{depth}"
    assert (config.epochs, config.data.batch_size, config.data.image_size) == (90, 512, 224)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.base, optimizer.lr, optimizer.weight_decay) == (
        "lesam",
        "sgd",
        0.2,
        1e-4,
    )
    assert (optimizer.sigma, optimizer.rho_max, config.schedule.anneal_start_epoch) == (0.3, 0.2, 60)
    assert (config.data.backend, config.precision.compute, config.parallel.strategy) == (
        "dali",
        "bf16",
        "ddp",
    )
