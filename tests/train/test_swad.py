"""SWAD's average against its definition, whenever it is looked at, and in a run that is cut off and resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train import trainer
from lesam_dist.train.swad import ValleyAverage
from lesam_dist.train.telemetry import read_metrics
from tests.checkpoints import read_checkpoint
from tests.conftest import Command
from tests.parallel.processes import run

STEPS, SEGMENTS = 3, 24


def valley(losses: list[float], converge: int, tolerance: int, ratio: float) -> tuple[int, int]:
    """First and last segment of the average after these losses, by the paper's words."""
    for start in range(len(losses) - converge + 1):
        first = losses[start : start + converge]
        if first[0] == min(first):
            threshold = (1 + ratio) * float(np.mean(first))
            end = start
            for i in range(start, len(losses)):
                if losses[i] <= threshold:
                    end = i
                elif i - end == tolerance and i >= start + converge:
                    break
            return start, end
    return len(losses) - 1, len(losses) - 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(2).double()


@pytest.mark.parametrize(("converge", "tolerance", "ratio"), [(3, 6, 0.3), (1, 1, 0.0), (4, 2, 0.1), (2, 3, 0.5)])
def test_it_is_the_mean_over_the_valley(seed: int, converge: int, tolerance: int, ratio: float) -> None:
    """At each of 24 evaluations; half way it goes on in another object, from its state."""
    random = np.random.default_rng(seed)
    middle = float(random.uniform(4, 12))
    curve = [1 + abs(i - middle) / 6 + 0.4 * float(random.random()) for i in range(SEGMENTS)]
    net = Net()
    average = ValleyAverage(net, converge, tolerance, ratio)
    seen: list[list[Tensor]] = []
    valleys = set()
    for segment, loss in enumerate(curve):
        seen.append([])
        for step in range(STEPS):
            with torch.no_grad():
                net.weight.copy_(torch.randn(4, 3, dtype=torch.float64))
                net.norm.running_mean.copy_(net.weight[0, :2])  # type: ignore[union-attr]
            skips = segment % 5 == 3 and step == 1
            average.update(torch.tensor(float(skips)))
            if not skips:
                seen[-1].append(net.weight.detach().clone())
        average.evaluated(loss)
        start, end = valley(curve[: segment + 1], converge, tolerance, ratio)
        valleys.add((start, end))
        # A segment counts as a whole: here one in five has a step less.
        means = [torch.stack(part).mean(dim=0) for part in seen[start : end + 1]]
        expected = torch.stack(means).mean(dim=0)
        with average.swapped():
            np.testing.assert_allclose(net.weight.detach().numpy(), expected.numpy(), rtol=0, atol=1e-12)
            np.testing.assert_allclose(net.norm.running_mean.numpy(), expected[0, :2].numpy(), rtol=0, atol=1e-12)  # type: ignore[union-attr]
        assert torch.equal(net.weight.detach(), seen[-1][-1]) or segment % 5 == 3
        if segment == SEGMENTS // 2:
            saved = {name: tensor.clone() for name, tensor in average.state_dict().items()}
            average = ValleyAverage(net, converge, tolerance, ratio)
            for name, tensor in average.state_dict().items():
                tensor.copy_(saved[name])
    assert ratio < 0.3 or any(start < end for start, end in valleys)


def leg(world: Distributed, seed: int, strategy: str) -> list[Any]:
    """What a small net gives for some inputs with the average, after each of 12 evaluations."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    model = wrap(net, world, strategy)  # type: ignore[arg-type]
    average, optimizer = ValleyAverage(net, 2, 3, 0.3), torch.optim.SGD(net.parameters(), lr=0.5)
    share = 8 // world.world_size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    found = []
    for loss in (3.0, 2.0, 1.0, 1.1, 1.2, 1.0, 2.0, 1.1, 3.0, 3.0, 3.0, 3.0):
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()
            average.update()
        average.evaluated(loss)
        with average.swapped(), torch.no_grad():
            found.append(net(x).numpy().copy())
    return found


def legs(world: Distributed, seed: int) -> list[list[Any]]:
    return [leg(world, seed, name) for name in (("ddp", "fsdp") if world.world_size > 1 else ("none",))]


def test_two_processes_have_the_average_of_one(seed: int) -> None:
    (alone,) = legs(Distributed(0, 0, 1, torch.device("cpu")), seed)
    for rank in run(legs, 2, seed):
        for found in rank:
            np.testing.assert_allclose(found, alone, rtol=0, atol=1e-4)  # measured: 2e-7


def test_a_loss_that_is_not_a_number_begins_no_valley() -> None:
    net = Net()
    average = ValleyAverage(net, 2, 3, 0.3)
    for loss in (math.nan, math.nan, 2.0, math.nan):
        average.update()
        average.evaluated(loss)
    with average.swapped():
        assert net.weight.isfinite().all()


def test_a_run_is_resumed_with_the_same_average(
    command: Command, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--ema.swad", "true", "--ema.swad_converge", "2", "--epochs", "5", "--checkpoint.every_steps", "2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*small, *flags, "--run_dir", whole)[0] == 0
    original = trainer.Trainer._step

    def cut_off(self: trainer.Trainer, batch: Any) -> Tensor:
        if self.step == 11:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", cut_off)
        assert command(*small, *flags, "--run_dir", cut)[0] == 130
    assert command(*small, *flags, "--run_dir", cut, "--resume", "auto")[0] == 0
    states = [read_checkpoint(sorted((folder / "checkpoints").glob("step_*"))[-1]) for folder in (whole, cut)]
    for part in ("model", "ema"):
        torch.testing.assert_close(states[1][part], states[0][part], rtol=0, atol=0, equal_nan=True)
    evaluations = [[line for line in read_metrics(folder) if line["split"] == "val"] for folder in (whole, cut)]
    assert evaluations[0] == evaluations[1]
    assert "ema_acc1" in evaluations[0][-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ema.swad", "true", "--ema.decay", "0.9"), "ema.decay is 0.9 and ema.swad is True: there is one average"),
        (("--ema.swad_tolerance", "4"), "ema.swad_tolerance is 4 but ema.swad is false: set it to true, or leave"),
        (("--ema.swad", "true", "--ema.swad_converge", "0"), "ema.swad_converge is 0: it must be at least 1."),
    ],
)
def test_what_is_refused(command: Command, small: tuple[str, ...], flags: tuple[str, ...], said: str) -> None:
    status, _, err = command(*small, *flags)
    assert status == 2
    assert said in err
