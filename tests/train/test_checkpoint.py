"""Checkpoints are whole or absent, and a damaged one never takes the run with it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesam_dist import LESAM
from lesam_dist.errors import UserError
from lesam_dist.parallel import Distributed
from lesam_dist.train import checkpoint as module
from lesam_dist.train.checkpoint import Checkpointer

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def make() -> tuple[nn.Module, LESAM]:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return net, LESAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def train_a_step(net: nn.Module, optimizer: LESAM) -> None:
    x = torch.randn(8, 4)

    def closure() -> torch.Tensor:
        loss = net(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def save_steps(
    folder: Path, keep: int, steps: range
) -> tuple[Checkpointer, nn.Module, LESAM, dict[int, dict[str, Any]]]:
    net, optimizer = make()
    checkpointer = Checkpointer(folder, keep, ALONE)
    states = {}
    for step in steps:
        train_a_step(net, optimizer)
        checkpointer.save(step, net, optimizer, {"epoch": step})
        states[step] = {k: v.clone() for k, v in net.state_dict().items()}
    return checkpointer, net, optimizer, states


def test_round_trip_is_bit_exact(seed: int, tmp_path: Path) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 3, range(1, 3))
    fresh_net, fresh = make()
    progress, damaged = checkpointer.load_latest(fresh_net, fresh)
    assert damaged == []
    assert progress is not None
    assert (progress["step"], progress["epoch"]) == (2, 2)
    torch.testing.assert_close(fresh_net.state_dict(), net.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fresh.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "none", 2, ALONE).load_latest(*make()) == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, range(1, 6))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000004", "step_00000005"]
    assert (tmp_path / "latest").read_text() == "step_00000005"


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpointer, _, _, states = save_steps(tmp_path, 3, range(1, 4))
    newest = tmp_path / "step_00000003"
    victim = newest / "manifest.json" if damage == "manifest" else next(newest.glob("*.distcp"))
    if damage == "delete":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-7])
    net, optimizer = make()
    progress, damaged = checkpointer.load_latest(net, optimizer)
    assert progress is not None
    assert progress["step"] == 2
    assert len(damaged) == 1
    assert str(victim) in damaged[0]
    torch.testing.assert_close(net.state_dict(), states[2], rtol=0, atol=0)
    # The run goes on from there and saves the damaged step anew.
    checkpointer.save(3, net, optimizer, {"epoch": 3})
    progress, damaged = checkpointer.load_latest(*make())
    assert (progress or {})["step"] == 3
    assert damaged == []


def test_nothing_but_damage_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    checkpointer, *_ = save_steps(tmp_path, 1, range(1, 2))
    victim = next((tmp_path / "step_00000001").glob("*.distcp"))
    victim.write_bytes(b"")
    with pytest.raises(UserError, match=r"distcp is truncated: 0 of \d+ bytes"):
        checkpointer.load_latest(*make())


def test_interrupted_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer, net, optimizer, states = save_steps(tmp_path, 2, range(1, 2))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save", full)
    with pytest.raises(UserError, match=r"step 2 could not be written.*No space left"):
        checkpointer.save(2, net, optimizer, {})
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("*step*")] == ["step_00000001"]
    fresh, fresh_optimizer = make()
    progress, _ = checkpointer.load_latest(fresh, fresh_optimizer)
    assert (progress or {})["step"] == 1
    torch.testing.assert_close(fresh.state_dict(), states[1], rtol=0, atol=0)


def test_manifest_is_readable_by_people(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, range(1, 2))
    manifest = json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["torch"] == torch.__version__
