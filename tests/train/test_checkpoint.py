"""Checkpoints are whole or absent, and a damaged one never takes the run with it."""

from __future__ import annotations

import json
import math
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesam_dist import LESAM
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import manifest
from lesam_dist.train.checkpoint import Checkpointer

MANIFEST = manifest.NAME
VERSIONS = {"torch": torch.__version__, "world_size": 1}
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
    "cut data": ("__0_0.distcp", truncate, "is truncated"),
    "no data": ("__0_0.distcp", Path.unlink, "is missing"),
    "a bit of the data": ("__0_0.distcp", lambda path: flip(path, path.stat().st_size // 3), "its checksum is"),
    "a bit of the metadata": (".metadata", lambda path: flip(path, 40), "its checksum is"),
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
    progress, damaged = checkpointer.load_latest(net, optimizer)
    assert progress is not None
    assert progress["step"] == 2
    assert len(damaged) == 1
    assert str(victim) in damaged[0]
    assert message in damaged[0]
    torch.testing.assert_close(net.state_dict(), states[2], rtol=0, atol=0)
    # The run goes on from there and saves the damaged step anew.
    checkpointer.save(3, net, optimizer, {"epoch": 3})
    progress, damaged = checkpointer.load_latest(*make())
    assert (progress or {})["step"] == 3
    assert damaged == []


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def as_metadata(folder: Path, evidence: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Code(evidence)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def as_other_file(folder: Path, evidence: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../step_00000001/__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


CRAFTED = {
    as_metadata: "asks for pathlib.Path.touch",
    as_other_file: "'../step_00000001/__0_0.distcp', which is no file",
}


@pytest.mark.parametrize("craft", CRAFTED, ids=lambda craft: craft.__name__)
def test_crafted_metadata_is_passed_over(tmp_path: Path, craft: Callable[[Path, Path], None]) -> None:
    """Whoever writes the files writes their checksums too."""
    checkpointer, _, _, states = save_steps(tmp_path, 3, range(1, 3))
    folder, evidence = tmp_path / "step_00000002", tmp_path / "evidence"
    craft(folder, evidence)
    content, files = manifest.read(folder)
    manifest.write(folder, {**content, "files": manifest.checksums(folder, files)})
    net, optimizer = make()
    progress, damaged = checkpointer.load_latest(net, optimizer)
    assert not evidence.exists()
    assert len(damaged) == 1
    assert CRAFTED[craft] in damaged[0]
    assert (progress or {})["step"] == 1
    torch.testing.assert_close(net.state_dict(), states[1], rtol=0, atol=0)


def test_crafted_value_runs_no_code(tmp_path: Path) -> None:
    checkpointer, net, optimizer, _ = save_steps(tmp_path, 3, range(1, 2))
    evidence = tmp_path / "evidence"
    optimizer.param_groups[0]["lr"] = Code(evidence)
    checkpointer.save(2, net, optimizer, {})
    with pytest.raises(UserError, match=r"step_00000002 cannot be loaded into this run: Weights only load failed"):
        checkpointer.load_latest(*make())
    assert not evidence.exists()


def test_checkpoint_of_another_model_is_an_error(tmp_path: Path) -> None:
    checkpointer, *_ = save_steps(tmp_path, 3, range(1, 2))
    net = nn.Linear(4, 6)
    with pytest.raises(UserError, match=r"cannot be loaded into this run: .*model\.weight"):
        checkpointer.load_latest(net, LESAM(net.parameters(), torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"step_00000009", b"../step_00000001"])
def test_pointer_to_nothing_means_the_newest(tmp_path: Path, content: bytes) -> None:
    checkpointer, *_ = save_steps(tmp_path, 3, range(1, 3))
    (tmp_path / "latest").write_bytes(content)
    progress, damaged = checkpointer.load_latest(*make())
    assert (progress or {})["step"] == 2
    assert damaged == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_just_saved_is_kept_after_going_back(tmp_path: Path) -> None:
    """keep 1, and a newer step is on disk: it is the one that goes, with what a killed save left behind."""
    save_steps(tmp_path, 3, range(1, 5))
    flip(tmp_path / "step_00000004" / "__0_0.distcp", 50)
    flip(tmp_path / "step_00000003" / "__0_0.distcp", 50)
    for folder in (".step_00000007.partial", "step_00000009.mine"):
        (tmp_path / folder).mkdir()
    checkpointer = Checkpointer(tmp_path, 1, ALONE)
    net, optimizer = make()
    assert (checkpointer.load_latest(net, optimizer)[0] or {})["step"] == 2
    train_a_step(net, optimizer)
    checkpointer.save(3, net, optimizer, {})
    assert names(tmp_path) == ["latest", "step_00000003", "step_00000009.mine"]
    again, optimizer = make()
    assert checkpointer.load_latest(again, optimizer) == ({"step": 3, "finite": True, **VERSIONS}, [])
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
    assert checkpointer.load_latest(*make()) == ({"step": 2, "epoch": 0.1, "finite": True, **VERSIONS}, [])
    flip(tmp_path / "step_00000002" / MANIFEST, 30)
    expected = {"step": 1, "epoch": 1, "finite": True, "evaluation": {"loss": math.inf}, "5": "a key that is no text"}
    assert checkpointer.load_latest(*make())[0] == expected | VERSIONS


def test_nothing_but_damage_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    checkpointer, *_ = save_steps(tmp_path, 1, range(1, 2))
    victim = next((tmp_path / "step_00000001").glob("*.distcp"))
    victim.write_bytes(b"")
    with pytest.raises(UserError, match=r"distcp is truncated: 0 of \d+ bytes"):
        checkpointer.load_latest(*make())


def test_disk_that_takes_no_more_leaves_the_older_one(tmp_path: Path) -> None:
    """A limit on the size of files is what can be had without a disk to fill; torch hides both behind numbers."""
    checkpointer, net, optimizer, states = save_steps(tmp_path, 2, range(1, 2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(UserError, match=r"step 2 could not be written.*File too large"):
            checkpointer.save(2, net, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["latest", "step_00000001"]
    fresh, fresh_optimizer = make()
    progress, _ = checkpointer.load_latest(fresh, fresh_optimizer)
    assert (progress or {})["step"] == 1
    torch.testing.assert_close(fresh.state_dict(), states[1], rtol=0, atol=0)


def test_manifest_is_readable_by_people(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, range(1, 2))
    manifest = json.loads((tmp_path / "step_00000001" / "manifest.json").read_text())
    assert manifest["step"] == 1
    assert manifest["torch"] == torch.__version__
