"""What a step that is skipped leaves behind in a run: nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lesam_dist.config.command_line import parse
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import trainer
from lesam_dist.train.run import build_trainer

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def state_of(this: trainer.Trainer) -> dict[str, Any]:
    """Everything of a run that steps change, but for counters of steps."""
    assert this.ema is not None
    return copy.deepcopy(
        {
            "model": this.model.state_dict(),
            "optimizer": this.optimizer.state_dict()["state"],
            "average": this.ema.state_dict(),
        }
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("lesam",),
        ("fsam",),
        ("lesam", "--data.micro_batches", "2", "--data.accumulation_mode", "micro"),
        ("sgd", "--optimizer.max_grad_norm", "1.0"),
        ("adamw",),
    ],
    ids=" ".join,
)
def test_a_bad_batch_changes_nothing(
    small: tuple[str, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    own = ("--epochs", "2", "--ema.decay", "0.5", "--run_dir", str(tmp_path), "--optimizer.name", *flags)
    this = build_trainer(parse([*small, *own]), ALONE)
    original = trainer.Trainer._step
    states: dict[int, dict[str, Any]] = {}

    def step(self: trainer.Trainer, batch: Any) -> Tensor:
        states[self.step] = state_of(self)
        batch[0][: 1 if self.step == 4 else 0] *= math.nan  # one image is enough
        return original(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    evaluation = this.fit()
    this.close()
    torch.testing.assert_close(states[5], states[4], rtol=0, atol=0)
    assert this.optimizer.telemetry["skipped"].item() == 1
    assert all(not torch.equal(states[4]["average"][name], states[3]["average"][name]) for name in states[4]["average"])
    assert math.isfinite(evaluation["loss"])
