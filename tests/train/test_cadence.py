"""When checkpoints are made: by epochs, by steps and by the clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import cadence as module
from lesam_dist.train.cadence import Cadence
from lesam_dist.train.run_state import seed_step
from tests.conftest import Command


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--checkpoint.every_steps", "2"), [2, 3, 4, 6, 8, 9]),
        (("--checkpoint.every_epochs", "7", "--checkpoint.every_steps", "4"), [4, 8, 9]),
    ],
)
def test_steps_and_epochs(
    command: Command, small: tuple[str, ...], tmp_path: Path, flags: tuple[str, ...], steps: list[int]
) -> None:
    assert command(*small, *flags, "--checkpoint.keep", "20", "--run_dir", tmp_path / "run")[0] == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert names == [f"step_{step:08d}" for step in steps]


def test_the_clock_of_rank_0_asks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    config = CheckpointConfig(every_minutes=2)
    worlds = [Distributed(rank, rank, 2, torch.device("cpu")) for rank in range(2)]
    cadences = [Cadence(config, 3, 10, world) for world in worlds]
    due = []
    for minute in range(1, 9):
        now[0] += 60
        for one in cadences:
            one.look_at_clock()
        due.append(worlds[0].agreed.due(minute))
        assert worlds[1].agreed.due(minute) is None, "rank 1 does not look"
        if minute == 5:  # a checkpoint for another reason
            for one in cadences:
                one.saved()
    assert due == [None, "save", None, "save", None, None, "save", None]


def test_each_step_and_rank_draws_its_own_numbers() -> None:
    drawn = set()
    for seed in range(3):
        for step in range(20):
            for rank in range(3):
                seed_step(seed, step, rank)
                first = torch.rand(()).item()
                seed_step(seed, step, rank)
                assert torch.rand(()).item() == first
                drawn.add(first)
    assert len(drawn) == 180
