"""Checkpoints are whole or absent, and a damaged one never takes the run with it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesam_dist import LESAM
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer, Loaded, manifest, payload
from lesam_dist.train.checkpoint import index as index_file
from tests.checkpoints import read_checkpoint

MANIFEST, DATA = manifest.NAME, "rank_00000.safetensors"
ALWAYS = {"torch": torch.__version__, "world_size": 1, "epoch_end": None, "finite": True}
ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def make() -> tuple[nn.Module, LESAM]:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return net, LESAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def keeping(folder: Path, keep: int, **fields: Any) -> Checkpointer:
    return Checkpointer(folder, ALONE, CheckpointConfig(keep=keep, **{"asynchronous": "never", **fields}))


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
    checkpointer = keeping(folder, keep)
    states = {}
    for step in steps:
        train_a_step(net, optimizer)
        checkpointer.save(step, net, optimizer, {"epoch": step})
        states[step] = {k: v.clone() for k, v in net.state_dict().items()}
    return checkpointer, net, optimizer, states


def step_of(loaded: Loaded) -> int:
    assert loaded.progress is not None
    step: int = loaded.progress["step"]
    return step


def what_was_saved(loaded: Loaded) -> dict[str, Any]:
    assert loaded.progress is not None
    return {name: value for name, value in loaded.progress.items() if name != "saved"}


def test_round_trip_is_bit_exact(seed: int, tmp_path: Path) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 3, range(1, 3))
    fresh_net, fresh = make()
    loaded = checkpointer.load_latest(fresh_net, fresh)
    assert loaded.damaged == []
    assert loaded.progress is not None
    assert (loaded.progress["step"], loaded.progress["epoch"]) == (2, 2)
    torch.testing.assert_close(fresh_net.state_dict(), net.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(fresh.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert keeping(tmp_path / "none", 2).load_latest(*make()) == Loaded(None)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, range(1, 6))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000004", "step_00000005"]
    assert (tmp_path / "latest").read_text() == "step_00000005"


def flip(path: Path, index: int) -> None:
    """Another value of one bit, at an index that may count from the end."""
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def change_progress(path: Path) -> None:
    path.write_text(path.read_text().replace('"epoch": 3', '"epoch": 4'))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut data": (DATA, truncate, "is truncated"),
    "no data": (DATA, Path.unlink, "is missing"),
    "a bit of the data": (
        "rank_00000.safetensors",
        lambda path: flip(path, path.stat().st_size // 3),
        "its checksum is",
    ),
    "a bit of the index": (index_file.NAME, lambda path: flip(path, 40), "its checksum is"),
    "cut manifest": (MANIFEST, truncate, "cannot be read"),
    "a digit in the manifest": (MANIFEST, change_progress, "its content is not that of its checksum"),
    "binary manifest": (MANIFEST, lambda path: path.write_bytes(bytes(range(256))), "cannot be read"),
    "a list as manifest": (MANIFEST, lambda path: path.write_text("[1]"), "no checksums"),
    "manifest of another shape": (MANIFEST, lambda path: path.write_text('{"files": {"a": 1}}'), "no checksums"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpointer, _, _, states = save_steps(tmp_path, 3, range(1, 4))
    name, apply, message = DAMAGE[damage]
    victim = tmp_path / "step_00000003" / name
    apply(victim)
    net, optimizer = make()
    loaded = checkpointer.load_latest(net, optimizer)
    assert step_of(loaded) == 2
    assert len(loaded.damaged) == 1
    assert str(victim) in loaded.damaged[0]
    assert message in loaded.damaged[0]
    torch.testing.assert_close(net.state_dict(), states[2], rtol=0, atol=0)
    # The run goes on from there and saves the damaged step anew.
    checkpointer.save(3, net, optimizer, {"epoch": 3})
    loaded = checkpointer.load_latest(*make())
    assert step_of(loaded) == 3
    assert loaded.damaged == []


def test_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    checkpointer, *_ = save_steps(tmp_path, 3, range(1, 2))
    net = nn.Linear(4, 6)
    with pytest.raises(UserError, match=r"cannot be loaded into this run: .*model\.bias"):
        checkpointer.load_latest(net, LESAM(net.parameters(), torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"step_00000009", b"../step_00000001"])
def test_pointer_to_nothing_means_the_newest(tmp_path: Path, content: bytes) -> None:
    checkpointer, *_ = save_steps(tmp_path, 3, range(1, 3))
    (tmp_path / "latest").write_bytes(content)
    loaded = checkpointer.load_latest(*make())
    assert step_of(loaded) == 2
    assert loaded.damaged == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_just_saved_is_kept_after_going_back(tmp_path: Path) -> None:
    """keep 1, and a newer step is on disk: it is the one that goes, with what a killed save left behind."""
    save_steps(tmp_path, 3, range(1, 5))
    flip(tmp_path / "step_00000004" / "rank_00000.safetensors", 50)
    flip(tmp_path / "step_00000003" / "rank_00000.safetensors", 50)
    for folder in (".step_00000007.partial", "step_00000009.mine"):
        (tmp_path / folder).mkdir()
    checkpointer = keeping(tmp_path, 1)
    net, optimizer = make()
    assert step_of(checkpointer.load_latest(net, optimizer)) == 2
    train_a_step(net, optimizer)
    checkpointer.save(3, net, optimizer, {})
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000009.mine"]
    again, optimizer = make()
    loaded = checkpointer.load_latest(again, optimizer)
    assert (what_was_saved(loaded), loaded.damaged) == ({"step": 3, **ALWAYS}, [])
    torch.testing.assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)


def test_the_last_finite_checkpoint_is_kept(tmp_path: Path) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 2, range(1, 4))
    for step in (4, 5, 6):
        checkpointer.save(step, net, optimizer, {}, finite=False)
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000005", "step_00000006"]
    checkpointer.save(7, net, optimizer, {})
    assert names(tmp_path) == ["latest", "step_00000006", "step_00000007"]


def test_progress_can_be_amended(tmp_path: Path) -> None:
    checkpointer, *_ = save_steps(tmp_path, 2, range(1, 3))
    checkpointer.amend(1, {"evaluation": {"loss": math.inf}, 5: "a key that is no text"})
    checkpointer.amend(2, {"epoch": 0.1})
    assert what_was_saved(checkpointer.load_latest(*make())) == {"step": 2, "epoch": 0.1, **ALWAYS}
    flip(tmp_path / "step_00000002" / MANIFEST, 30)
    expected = {"step": 1, "epoch": 1, "evaluation": {"loss": math.inf}, "5": "a key that is no text"}
    assert what_was_saved(checkpointer.load_latest(*make())) == expected | ALWAYS


def test_nothing_but_damage_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    checkpointer, *_ = save_steps(tmp_path, 1, range(1, 2))
    victim = next((tmp_path / "step_00000001").glob("*.safetensors"))
    victim.write_bytes(b"")
    with pytest.raises(UserError, match=r"safetensors is truncated: 0 of \d+ bytes"):
        checkpointer.load_latest(*make())


def test_disk_that_takes_no_more_leaves_the_older_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files is what can be had without a disk to fill."""
    checkpointer, net, optimizer, states = save_steps(tmp_path, 2, range(1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert checkpointer.save(2, net, optimizer, {}) is False
        assert re.search(
            r"^warning: .* step 2 could not be written.*File too large.*run goes on", capsys.readouterr().out
        )
        with pytest.raises(UserError, match=r"step 2 could not be written.*File too large.*--resume auto"):
            checkpointer.save(2, net, optimizer, {}, final=True)
        checkpointer.amend(2, {"evaluation": None})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["latest", "step_00000001"]
    fresh, fresh_optimizer = make()
    loaded = checkpointer.load_latest(fresh, fresh_optimizer)
    assert step_of(loaded) == 1
    torch.testing.assert_close(fresh.state_dict(), states[1], rtol=0, atol=0)


def test_manifest_is_readable_by_people(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, range(1, 2))
    manifest = json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["torch"] == torch.__version__


def test_epochs_and_the_best_are_kept(tmp_path: Path) -> None:
    """Epochs 2 and 4 by their number, epoch 3 by its evaluation, which comes after the save; the last two as such."""
    net, optimizer = make()
    checkpointer = keeping(tmp_path, 2, keep_every_epochs=2)
    acc1 = {1: 50.0, 2: 60.0, 3: 70.0, 4: math.nan, 5: 69.0, 6: 65.0, 7: 70.0}
    for epoch in range(1, 7):
        checkpointer.save(10 * epoch - 5, net, optimizer, {"evaluation": None})
        checkpointer.save(10 * epoch, net, optimizer, {"evaluation": None}, epoch_end=epoch)
        checkpointer.amend(10 * epoch, {"evaluation": {"acc1": acc1[epoch]}})
    steps = [int(name.removeprefix("step_")) for name in names(tmp_path) if name != "latest"]
    assert steps == [20, 30, 40, 55, 60]
    checkpointer.save(70, net, optimizer, {"evaluation": {"acc1": 10.0, "ema_acc1": 70.0}}, epoch_end=7)
    assert "step_00000030" not in names(tmp_path), "of two as good the newer one"


def test_a_damaged_one_does_not_count_and_stays(tmp_path: Path) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 2, range(1, 4))
    truncate(tmp_path / "step_00000003" / DATA)
    for step in (4, 5):
        checkpointer.save(step, net, optimizer, {})
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000004", "step_00000005"]


def test_what_a_killed_save_was_about_to_replace_comes_back(tmp_path: Path) -> None:
    checkpointer, _, _, states = save_steps(tmp_path, 1, range(1, 2))
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.replaced")
    net, optimizer = make()
    assert step_of(checkpointer.load_latest(net, optimizer)) == 1
    torch.testing.assert_close(net.state_dict(), states[1], rtol=0, atol=0)


def test_perturbed_weights_are_not_saved(tmp_path: Path) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 1, range(1, 2))
    net(torch.randn(8, 4)).square().sum().backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"the weights are perturbed.*restore\(\) first"):
        checkpointer.save(2, net, optimizer, {})
    optimizer.restore()
    assert checkpointer.save(2, net, optimizer, {})


@pytest.mark.parametrize("value", [torch.float32, {1, 2}, b"x", 1j, [1, object()]])
def test_a_value_that_json_cannot_hold_is_named(tmp_path: Path, value: object) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 1, range(1, 2))
    optimizer.param_groups[0]["mine"] = value
    with pytest.raises(UserError, match=r"'optimizer\.param_groups\.0\.mine' cannot be saved: it is a "):
        checkpointer.save(2, net, optimizer, {})


def test_a_dtype_that_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    net, optimizer = make()
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"'model\.phase' cannot be saved: it is of torch\.complex64, and .*bfloat16"):
        keeping(tmp_path, 1).save(1, net, optimizer, {})


def test_values_come_back_as_they_were(seed: int, tmp_path: Path) -> None:
    values = {"float": 0.1 + 0.2, "inf": math.inf, "nested": ((1, 2.5), [None, "ö"]), "empty": (), "flag": True}
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 1, range(1, 2))
    optimizer.param_groups[0].update(values)
    checkpointer.save(2, net, optimizer, {})
    net, optimizer = make()
    optimizer.param_groups[0].update({"float": 1.0, "inf": 0.0, "nested": ((0, 0.0), []), "empty": (1,), "flag": False})
    checkpointer.load_latest(net, optimizer)
    assert optimizer.param_groups[0].items() >= values.items()


def test_training_goes_on_while_a_checkpoint_is_written(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto: the third save takes more than 1 % of the time since the last, and makes the next ones asynchronous."""
    goes_on, in_thread = threading.Event(), []
    original = payload.write

    def write(path: Path, tensors: Any) -> Any:
        in_thread.append(threading.current_thread() is not threading.main_thread())
        assert not in_thread[-1] or goes_on.wait(60)
        return original(path, tensors)

    monkeypatch.setattr(payload, "write", write)
    # The checkpointer is made; begin and end of each save; and again for each of the last two.
    clock = iter([0.0, *(50.0, 50.4), *(100.0, 100.4), *(150.0, 150.6), 200.0, 250.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    net, optimizer = make()
    checkpointer = keeping(tmp_path, 5, asynchronous="auto")
    states = {}
    for step in range(1, 6):
        train_a_step(net, optimizer)
        states[step] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        if step == 5:
            goes_on.set()  # it waits for the one before
        assert checkpointer.save(step, net, optimizer, {})
        assert (tmp_path / f"step_0000000{step}").exists() == (step < 4) or step == 5
        train_a_step(net, optimizer)
    assert checkpointer.wait()
    assert in_thread == [False, False, False, True, True]
    for step, state in states.items():
        saved = read_checkpoint(tmp_path / f"step_0000000{step}")["model"]
        torch.testing.assert_close(saved, state, rtol=0, atol=0)


def test_a_save_that_fails_beside_the_training_is_said_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 2, range(1, 2))
    checkpointer.config.asynchronous = "always"

    def full(path: Path, tensors: Any) -> Any:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(payload, "write", full)
        assert checkpointer.save(2, net, optimizer, {})
        checkpointer.amend(2, {})  # which waits too
        assert checkpointer.wait() is False
    assert "step 2 could not be written" in capsys.readouterr().out
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert checkpointer.save(2, net, optimizer, {})
    assert checkpointer.wait()
    assert capsys.readouterr().out == ""
    assert (tmp_path / "latest").read_text() == "step_00000002"
