"""What a run says of itself at its start: its samples and every value that it trains with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lesam_dist.config.command_line import parse
from lesam_dist.config.methods import complete
from lesam_dist.config.schema import Config
from lesam_dist.data.skip_list import Skipped, write_skip_list
from lesam_dist.data.table import Table
from lesam_dist.optim.engine.registry import methods
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.tasks.task import Task
from lesam_dist.train.build import build_optimizer
from lesam_dist.train.opening import describe_settings
from tests.conftest import CLASSES, TRAIN, VAL

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


class Sentences(Classification):
    """A task on what is no image."""

    metric = Task.metric

    def open_data(self) -> tuple[Table, Table]:  # type: ignore[override]
        return Table(torch.zeros(1200, 2), "a corpus"), Table(torch.zeros(30, 2))


def rows(config: Config, task: type[Task] = Sentences) -> dict[str, str]:
    """The text by name; the texts begin in one column."""
    lines = describe_settings(task(config, ALONE)).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert len({re.match(r"  \S.*?  +| +", line).end() for line in lines}) == 1  # type: ignore[union-attr]
    whole: list[str] = []
    for line in lines:
        if line.startswith("   "):
            whole[-1] += f"  {line.strip()}"
        else:
            whole.append(line.strip())
    return {line.split()[0]: line for line in whole}


def test_images_and_what_is_left_out(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(images, root)
    skip = sorted(path.relative_to(root).as_posix() for path in (root / "train" / "0").iterdir())[:2]
    write_skip_list(tmp_path / "skip.json", [Skipped(path, "broken", 1) for path in skip], [])
    (root / "val" / "1" / "notes.txt").write_text("")
    flags = ["--config", "digits", "--data.root", str(root), "--data.builtin", "null"]
    found = rows(parse([*flags, "--data.skip_list", str(tmp_path / "skip.json")]), Classification)
    train, val, classes = TRAIN * len(CLASSES) - 2, VAL * len(CLASSES), len(CLASSES)
    assert f"{train} training and {val} validation images of {classes} classes, from" in found["data"]
    assert str(root) in found["data"]
    assert found["left"] == "left out  2 training images (data.skip_list), 1 .txt files (validation)"


def test_samples_that_are_no_images() -> None:
    found = rows(parse(["--config", "digits"]))
    assert found["data"] == "data   1,200 training and 30 validation samples, from a corpus"


def test_a_dry_run_reads_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sentences, "open_data", lambda _: pytest.fail("it was read"))
    assert "data" not in rows(parse(["--config", "digits", "--dry_run"]))


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_argument_of_every_method(name: str) -> None:
    """With the value that the optimizer has in its groups, where it has it there."""
    config = parse(["--config", "digits", "--optimizer.name", name])
    found = rows(config)[name]
    optimizer = build_optimizer(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), config.optimizer)
    group = optimizer.param_groups[-1]
    for argument, value in complete(config.optimizer).items():
        shown = re.search(rf"\b{argument} (\S+)", found)
        assert shown, found
        if isinstance(value, float):
            assert float(shown[1]) == pytest.approx(group.get(argument, value))


def test_values_that_were_given_and_those_that_were_not() -> None:
    flags = [
        "--optimizer.lr_scaling",
        "linear",
        "--optimizer.lr_reference_batch",
        "16",
        "--optimizer.max_grad_norm",
        "3",
    ]
    found = rows(parse(["--config", "digits", "--optimizer.base", "adamw", "--ema.decay", "0.99", *flags]))
    assert "lr 0.2  betas [0.9, 0.999]  weight_decay 0.0005" in found["adamw"], "a batch of 32"
    assert found["lesam"].endswith("max_grad_norm 3")
    assert found["average"] == "average  decay 0.99"
    assert "a cosine from epoch 4 to 0 at epoch 15" in found["sigma"]
    plain = rows(parse(["--config", "digits", "--optimizer.name", "sgd", "--schedule.lr_decay", "none"]))
    assert {"lesam", "sigma"}.isdisjoint(plain)
    assert plain["lr"] == "lr    1 epochs of warm-up, then the same to the end"
