"""Whole runs that something goes wrong in: a loss that jumps, replicas that part, a disk that is full for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist.config.command_line import parse
from lesam_dist.errors import SharedError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import trainer as module
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.guard import LossGuard
from lesam_dist.train.run import train_here
from tests.checkpoints import latest, read_checkpoint
from tests.conftest import Command
from tests.parallel.processes import run
from tests.train.test_trainer import timeless

JUMPS = (23, 26)  # steps that are spoilt; the average of the loss is of use from the 21st on
GUARD = ("--epochs", "10", "--guard.max_loss_increase", "30", "--checkpoint.every_steps", "5")


class Spoilt(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 20 * super().forward(logits, labels) + 100


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss, and a gradient, that is far too large whenever these steps are made."""
    original = module.Trainer._step

    def spoilt(self: module.Trainer, batch: Any) -> Tensor:
        with monkeypatch.context() as patch:
            if self.step + 1 in JUMPS:
                patch.setattr(self.task, "_criteria", (Spoilt(), Spoilt()))
            return original(self, batch)

    monkeypatch.setattr(module.Trainer, "_step", spoilt)


def test_a_jump_is_a_batch_left_out(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes back equals, bit for bit, one that is told from the start which batches to leave out."""
    told, found = tmp_path / "told", tmp_path / "found"
    with monkeypatch.context() as patch:
        patch.setattr(LossGuard, "leaves_out", lambda self, step: step in JUMPS)
        assert command(*small, *GUARD, "--run_dir", told)[0] == 0
    spoil(monkeypatch)
    status, out, err = command(*small, *GUARD, "--run_dir", found, "--checkpoint.asynchronous", "always")
    assert (status, err) == (0, "")
    assert [line.partition(" (")[0] for line in out.splitlines() if "jumped" in line] == [
        f"warning: the loss jumped at step {step}" for step in JUMPS
    ]
    assert timeless(found) == timeless(told)
    steps = [line["step"] for line in timeless(found) if line["split"] == "train"]
    assert steps == [step for step in range(1, 31) if step not in JUMPS]
    assert_same(found, told)


def test_too_many_jumps_end_the_run(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    status, _, err = command(*small, *GUARD, "--guard.max_rollbacks", "1", "--run_dir", tmp_path / "run")
    assert status == 2
    assert len(err.splitlines()) == 2  # and how to go on
    assert "guard.max_loss_increase 30 2 times, and guard.max_rollbacks is 1: at step 23 (loss" in err


def assert_same(first: Path, second: Path) -> None:
    one, two = read_checkpoint(latest(first)), read_checkpoint(latest(second))
    for part in ("model", "optimizer", "own"):
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)


def flip_a_bit(world: Distributed, root: str, folder: str) -> str:
    """A momentum of rank 1 changes by a bit after step 4; replicas are compared every 3 steps."""
    original = module.Trainer._step

    def flipping(self: module.Trainer, batch: Any) -> Tensor:
        loss = original(self, batch)
        if self.step == 3 and world.rank == 1:
            state: dict[str, Any] = list(self.optimizer.state.values())[1]  # of a vector
            state["momentum_buffer"].view(torch.int32)[5] ^= 1
        return loss

    module.Trainer._step = flipping  # type: ignore[method-assign]
    flags = ["--config", "digits", "--data.root", root, "--data.builtin", "null", "--data.batch_size", "12"]
    flags += ["--data.image_size", "8", "--data.val_resize", "8", "--epochs", "2", "--parallel.device", "cpu"]
    flags += ["--schedule.anneal_start_epoch", "null", "--checks.every_steps", "3", "--checkpoint.every_steps", "3"]
    try:
        train_here(parse([*flags, "--run_dir", folder]), world)
    except SharedError as error:
        return str(error)
    return ""


def test_replicas_that_part_end_the_run_before_the_next_checkpoint(images: Path, tmp_path: Path) -> None:
    for message in run(flip_a_bit, 2, str(images), str(tmp_path / "run")):
        assert message.startswith("the replicas are no longer equal at step 5: rank 0 on "), message
        assert "momentum_buffer of " in message
        assert "All were equal at step 3." in message
        assert "step_00000003, is not of later: go on with --resume auto." in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000003"]


def test_a_full_disk_costs_a_checkpoint_and_no_more(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of nine saves four find no room, the last among them, which is made again after the evaluation."""
    original, calls = Checkpointer.save, []

    def full(self: Checkpointer, step: int, *args: Any, final: bool = False, **kwargs: Any) -> bool:
        calls.append((step, final))
        if step in (2, 3, 6, 9) and not final:
            return False
        return original(self, step, *args, final=final, **kwargs)

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert command(*small, "--run_dir", whole)[0] == 0
    monkeypatch.setattr(Checkpointer, "save", full)
    flags = ("--checkpoint.every_steps", "1", "--checkpoint.keep", "9")
    assert command(*small, *flags, "--run_dir", run_dir)[0] == 0
    assert calls == [*((step, False) for step in range(1, 10)), (9, True)]
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert names == [f"step_{step:08d}" for step in (1, 4, 5, 7, 8, 9)]
    assert timeless(run_dir) == timeless(whole)
    assert_same(run_dir, whole)
