"""What a run says that waits for its data: when, how often, and what to change by how much."""

from __future__ import annotations

import os

import pytest
import torch

from lesam_dist.config.schema import Config, DataConfig
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.input_bound import InputBound, remedy

GPU = Distributed(0, 0, 2, torch.device("cuda", 0), local_world_size=2)
CPU = Distributed(0, 0, 1, torch.device("cpu"))


def config(workers: int = 4, **data: object) -> Config:
    return Config(data=DataConfig(workers=workers, backend="dali", **data))  # type: ignore[arg-type]


def test_it_is_said_once_and_not_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = InputBound(config(), CPU)
    assert bound.warning(50, 0.9) is None, "readers start"
    assert bound.warning(100, 0.1) is None
    said = bound.warning(150, 0.5)
    assert said is not None
    assert said.startswith("warning: 50% of the time until step 150")
    assert bound.warning(200, 0.9) is None


def test_single_steps_are_taken_together() -> None:
    """One step that waits is no run that does: 9 of 10 steps have all they need."""
    bound = InputBound(config(), CPU)
    waits = [1.0, *[0.0] * 9, 1.0, *[0.1] * 9, *[0.3] * 11]
    said = [bound.warning(step, wait) for step, wait in enumerate(waits)]
    assert [step for step, text in enumerate(said) if text] == [len(waits) - 1]


def test_a_run_that_goes_back_is_no_interval() -> None:
    bound = InputBound(config(), CPU)
    assert bound.warning(50, 0.0) is None
    assert bound.warning(30, 1.0) is None
    assert bound.warning(80, 0.0) is None


def test_how_many_workers_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 workers that leave a device idle for half of the time are half of what it takes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert remedy(config(4), GPU, 0.5) == "Set data.workers to 8 (now 4; 16 cores for each process)."
    assert "to 16 (now 10; 16 cores for each process, which is not enough: it would take 20)" in remedy(
        config(10), GPU, 0.5
    )
    busy = remedy(config(16), GPU, 0.5)
    assert "All 16 cores of a process are reading (data.workers 16)" in busy
    assert "lesam-dist pack" in busy
    assert "give each process 32 cores" in busy
    assert "data.backend" not in busy


def test_what_is_left_where_cores_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    slow = Config(data=DataConfig(workers=8, backend="torchvision"))
    assert "choose data.backend dali (now torchvision)" in remedy(slow, GPU, 0.5)
    assert "data.backend" not in remedy(slow, CPU, 0.5)
    assert "choose data.backend torchvision (now dali)" in remedy(config(8), CPU, 0.5)
    assert "data.workers" not in remedy(config(1), CPU, 0.5), "the network computes on the other cores"
    assert "on the device itself" in remedy(config(builtin="cifar10"), GPU, 0.5)
