"""m, the samples behind a perturbation, and the learning rate of a scaled batch: computed, printed and logged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import LESAM
from lesam_dist.config.command_line import parse
from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.train.perturbed_samples import samples_per_perturbation
from lesam_dist.train.updates import Updates
from tests.conftest import Command
from tests.told import told


def world(processes: int, node: int = 0) -> Distributed:
    """The first of so many, ``node`` of them on its host."""
    return Distributed(0, 0, processes, torch.device("cpu"), local_world_size=node or processes)


def config(*flags: str) -> Any:
    return parse(["--config", "digits", "--schedule.anneal_start_epoch", "null", *flags])


FRACTION, MICRO = ("--optimizer.ascent_fraction", "0.3"), ("--data.accumulation_mode", "micro")
REPLICA = ("--parallel.strategy", "hsdp", "--optimizer.scope", "replica")


@pytest.mark.parametrize(
    ("flags", "where", "m"),
    [
        ((), world(1), 96),
        ((), world(8), 96),  # averaged over all
        (("--data.micro_batches", "4"), world(8), 96),
        (("--optimizer.scope", "local"), world(8), 12),
        ((*REPLICA, "--parallel.shard_size", "4"), world(8), 48),
        ((*REPLICA, "--parallel.replicate_size", "4"), world(8), 24),
        (REPLICA, world(16, 8), 48),  # a node's
        (FRACTION, world(8), 32),  # of 12, 3.6: 4 on each of 8
        ((*FRACTION, "--optimizer.scope", "local"), world(8), 4),
        ((*MICRO, "--data.micro_batches", "4"), world(8), 24),  # 3 on each of 8
        ((*MICRO, "--data.micro_batches", "4", *FRACTION, "--optimizer.scope", "local"), world(8), 1),
        (("--optimizer.name", "esam"), world(2), 96),
        (("--optimizer.name", "sgd"), world(2), None),
        (("--optimizer.name", "msam"), world(2), None),
    ],
)
def test_m(flags: tuple[str, ...], where: Distributed, m: int | None) -> None:
    assert samples_per_perturbation(config("--data.batch_size", "96", *flags), where) == m


class Counting(nn.Linear):
    """Notes how many samples each forward has, by whether it is of a pass that perturbs."""

    optimizer: LESAM

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.samples: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.optimizer.descends:
            self.samples.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize(("mode", "parts"), [("batch", 1), ("batch", 4), ("micro", 4)])
def test_m_is_what_the_first_passes_see(seed: int, mode: str, parts: int) -> None:
    fraction, batch = 0.05 + 0.95 * torch.rand(()).item(), 4 * int(torch.randint(1, 9, ()))
    if mode == "batch" and parts > 1:
        fraction = 1.0  # a part of a batch need not divide into micro-batches
    flags = ("--data.micro_batches", str(parts), "--data.accumulation_mode", mode)
    run = config("--data.batch_size", str(batch), "--optimizer.ascent_fraction", str(fraction), *flags)
    net = Counting()
    net.optimizer = LESAM(net.parameters(), SGD, lr=0.1, ascent_fraction=fraction)
    updates = Updates(Classification(run, world(1)), *told(world(1)), net, net.optimizer, None, None, 1)
    updates.make(0, (torch.randn(batch, 3), torch.randint(2, (batch,))), logged=False)
    perturbations = parts if mode == "micro" else 1
    m = samples_per_perturbation(run, world(1))
    assert m is not None
    assert sum(net.samples) == perturbations * m


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 20 / 64), ("sqrt", math.sqrt(20 / 64))])
def test_a_scaled_learning_rate(scaling: str, factor: float) -> None:
    flags = () if scaling == "none" else ("--optimizer.lr_reference_batch", "64")
    run = config("--optimizer.lr", "0.3", "--data.batch_size", "20", "--optimizer.lr_scaling", scaling, *flags)
    assert peak_lr(run) == pytest.approx(0.3 * factor, rel=1e-15)


def test_both_are_said_and_logged(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--optimizer.base", "lamb", "--optimizer.lr", "0.064", "--optimizer.ascent_fraction", "0.5")
    flags += ("--optimizer.lr_scaling", "sqrt", "--optimizer.lr_reference_batch", "80", "--epochs", "1")
    flags += ("--schedule.lr_warmup_epochs", "0", "--schedule.anneal_start_epoch", "null")
    status, out, err = command(*small, "--run_dir", tmp_path / "run", *flags)
    assert (status, err) == (0, "")
    assert "lesam on lamb, global scope, m = 10 samples per perturbation" in out
    assert "batch 20 (lr 0.064 for 80, sqrt: 0.032)" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    assert (first["m"], first["lr"]) == (10, pytest.approx(0.032, rel=1e-12))
