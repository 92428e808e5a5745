"""lesam-dist export and lesam-dist checkpoints, on what runs and people leave in folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lesam_dist import LESAM
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer, manifest
from lesam_dist.train.ema import WeightAverage

Call = Callable[..., tuple[int, str, str]]
OLD = Path(__file__).parent / "format1"
DATA = "rank_00000.safetensors"


Saved = tuple[Path, nn.Module, WeightAverage]


@pytest.fixture
def saved(seed: int, tmp_path: Path) -> Saved:
    """A run with four checkpoints of a bfloat16 model with averages; the second is the best, the last not finite."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    optimizer, ema = LESAM(net.parameters(), torch.optim.SGD, lr=0.1), WeightAverage(net, 0.5)
    config = CheckpointConfig(keep=9, asynchronous="never")
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", Distributed(0, 0, 1, torch.device("cpu")), config)
    for step, acc1 in ((10, 20.0), (20, 60.0), (30, 40.0), (40, None)):
        for p in net.parameters():
            nn.init.normal_(p)
        ema.update()
        evaluation = None if acc1 is None else {"acc1": 0.0, "ema_acc1": acc1}
        checkpointer.save(step, net, optimizer, {"epoch": step // 10, "evaluation": evaluation}, ema, finite=step < 40)
    return tmp_path / "run", net, ema


def test_export_writes_what_the_model_loads(call: Call, saved: Saved, tmp_path: Path) -> None:
    run_dir, net, ema = saved
    output = tmp_path / "model.safetensors"
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "step_00000040"):
        status, out, err = call("export", folder, output, "--force")
        assert (status, err) == (0, "")
        assert out == f"{output}: weights of step 40, 7 tensors with 33 elements\n"
        torch.testing.assert_close(load_file(output), dict(net.state_dict()), rtol=0, atol=0)
    assert call("export", run_dir, tmp_path / "ema", "--ema")[0] == 0
    with ema.swapped():
        torch.testing.assert_close(load_file(tmp_path / "ema"), dict(net.state_dict()), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema", "model.safetensors", "run"]


def test_export_of_format_1(call: Call, tmp_path: Path) -> None:
    assert call("export", OLD, tmp_path / "out", "--ema")[:2] == (
        0,
        f"{tmp_path / 'out'}: averaged weights of step 2, 9 tensors with 30 elements\n",
    )
    torch.testing.assert_close(
        load_file(tmp_path / "out")["2.bias"], torch.tensor([-3.5315158367156982, -3.920773983001709])
    )


def test_bad_input_is_one_line(call: Call, saved: Saved, tmp_path: Path) -> None:
    run_dir = saved[0]
    (tmp_path / "there").write_text("mine")
    alone = tmp_path / "alone" / "checkpoints" / "step_00000020"
    shutil.copytree(run_dir / "checkpoints" / "step_00000020", alone)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("export", run_dir), "required: output"),
        (("export", tmp_path / "none", "out"), "is no checkpoint"),
        (("export", run_dir, tmp_path / "there"), "exists: choose another name, or overwrite it with --force"),
        (("export", run_dir, tmp_path), "is a folder"),
        (("export", run_dir, tmp_path / "none" / "out"), "is no folder"),
        (("export", run_dir, tmp_path / "out", "--emma"), "unrecognized arguments: --emma"),
        (("checkpoints", tmp_path / "none"), "has no checkpoints"),
        (("checkpoints", run_dir, "--prune", "0"), "invalid number, which is at least 1, value: '0'"),
        (("checkpoints", run_dir, "--delete", "../run"), "no checkpoint '../run': there are step_00000040"),
        (("checkpoints", run_dir, "--delete", "50"), "no checkpoint '50'"),
        (("checkpoints", tmp_path / "alone", "--delete", "20"), "is the only checkpoint that is whole"),
    ]
    for argv, message in cases:
        status, _, err = call(str(argv[0]), *argv[1:])
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err
    assert (tmp_path / "there").read_text() == "mine"
    assert alone.exists()
    content, files = manifest.read(alone)
    manifest.write(alone, {**content, "format": 3, "files": files})
    assert "has format 3" in call("export", tmp_path / "alone", tmp_path / "out")[2]


def test_damage_is_not_exported(call: Call, saved: Saved, tmp_path: Path) -> None:
    victim = saved[0] / "checkpoints" / "step_00000040" / DATA
    victim.write_bytes(victim.read_bytes()[:-1])
    status, _, err = call("export", saved[0], tmp_path / "out")
    assert status == 2
    assert f"{victim} is truncated" in err
    assert not (tmp_path / "out").exists()


def columns(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.startswith("step_")]


def test_the_table(call: Call, saved: Saved) -> None:
    status, out, err = call("checkpoints", saved[0])
    assert (status, err) == (0, "")
    rows = columns(out)
    assert [row[0] for row in rows] == [f"step_000000{step}" for step in (40, 30, 20, 10)]
    assert [row[1:3] for row in rows] == [[str(epoch), "1"] for epoch in (4, 3, 2, 1)]
    assert [row[8:] for row in rows] == [
        ["-", "no", "latest", "complete"],
        ["40.00", "yes", "complete"],
        ["60.00", "yes", "best", "complete"],
        ["20.00", "yes", "complete"],
    ]
    assert columns(call("checkpoints", OLD)[1])[0][0] == "step_00000002"


def test_verify_finds_damage(call: Call, saved: Saved) -> None:
    assert call("checkpoints", saved[0], "--verify")[0] == 0
    victim = saved[0] / "checkpoints" / "step_00000020" / DATA
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert columns(call("checkpoints", saved[0])[1])[2][-1] == "complete", "its size is right"
    status, out, _ = call("checkpoints", saved[0], "--verify")
    assert status == 1
    assert [row[-1] for row in columns(out)] == ["verified", "verified", "damaged", "verified"]
    assert f"{victim} is damaged: its checksum is" in out


def left(saved: Saved) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (saved[0] / "checkpoints").glob("step_*"))


def test_prune_and_delete(call: Call, saved: Saved) -> None:
    """What stays is the newest, the newest finite and the best; a damaged one does not count, and stays too."""
    assert call("checkpoints", saved[0], "--prune", "1")[0] == 0
    assert left(saved) == [20, 30, 40]
    for step in (40, 30):
        (saved[0] / "checkpoints" / f"step_000000{step}" / DATA).write_bytes(b"")
    assert call("checkpoints", saved[0], "--prune", "1")[0] == 0
    assert left(saved) == [20, 30, 40]
    assert call("checkpoints", saved[0], "--delete", "20")[0] == 2
    assert call("checkpoints", saved[0], "--delete", "step_00000030")[0] == 0
    assert call("checkpoints", saved[0], "--delete", "40")[0] == 0
    assert left(saved) == [20]
    assert call("export", saved[0], saved[0] / "out")[0] == 0


@pytest.mark.parametrize("command", ["export", "checkpoints"])
def test_help(call: Call, command: str) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    assert f"usage: lesam-dist {command}" in out
    assert "example:" in out
