"""Checkpoints of earlier and later formats: the first is read, with care; a later one is named."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer, manifest
from lesam_dist.train.ema import WeightAverage
from tests.checkpoints import read_checkpoint

OLD = Path(__file__).parent / "format1"  # its README says how it was made
STEP = "step_00000002"
# As the process that wrote it had them.
BIAS = torch.tensor([-4.15794563293457, -4.55804443359375])
AVERAGED_BIAS = torch.tensor([-3.5315158367156982, -3.920773983001709])
MOMENTUM_OF_BIAS = torch.tensor([26.0406, 26.1038])  # as printed


def make() -> tuple[nn.Module, LESAM, WeightAverage]:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return net, LESAM(net.parameters(), torch.optim.SGD, lr=0.7, momentum=0.9), WeightAverage(net, 0.5)


def checkpointer(folder: Path) -> Checkpointer:
    config = CheckpointConfig(keep=3, asynchronous="never")
    return Checkpointer(folder, Distributed(0, 0, 1, torch.device("cpu")), config)


def copied(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_format_1_is_loaded_and_saved_as_what_is_new(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    net, optimizer, ema = make()
    loaded = checkpointer(folder).load_latest(net, optimizer, ema)
    assert (loaded.damaged, loaded.own) == ([], {})
    assert (loaded.progress or {}).items() >= {"step": 2, "epoch": 1, "finite": True, "world_size": 1}.items()
    state, average = net.state_dict(), ema.state_dict()
    torch.testing.assert_close(state["2.bias"], BIAS, rtol=0, atol=0)
    assert state["1.num_batches_tracked"] == 4
    torch.testing.assert_close(average["2.bias"], AVERAGED_BIAS, rtol=0, atol=0)
    assert average["n_averaged"] == 2
    momentum: Tensor = optimizer.state_dict()["state"][5]["momentum_buffer"]
    torch.testing.assert_close(momentum, MOMENTUM_OF_BIAS, rtol=1e-5, atol=0)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["plus_form"]) == (0.125, 0.5, "paper")
    assert checkpointer(folder).save(3, net, optimizer, {}, ema)
    again = read_checkpoint(folder / "step_00000003")
    torch.testing.assert_close(again["model"], dict(state), rtol=0, atol=0)
    assert not list((folder / "step_00000003").glob(".*"))


def amended(folder: Path, **fields: Any) -> None:
    """Whoever writes the files writes their checksums too."""
    content, files = manifest.read(folder)
    manifest.write(folder, {**content, **fields, "files": manifest.checksums(folder, files)})


@pytest.mark.parametrize("ask", ["load_latest", "progress"])
def test_a_later_format_is_named(tmp_path: Path, ask: str) -> None:
    folder = copied(tmp_path)
    amended(folder / STEP, format=7)
    with pytest.raises(UserError, match=r"_00000002 has format 7, and .*0\.1\.0.* up to format 2.*upgrade"):
        getattr(checkpointer(folder), ask)(*(make() if ask == "load_latest" else ()))


@pytest.mark.parametrize("version", [0, -1, "2", 1.5, None, True])
def test_what_is_no_format_is_damage(tmp_path: Path, version: Any) -> None:
    folder = copied(tmp_path)
    amended(folder / STEP, format=version)
    with pytest.raises(UserError, match=r"no checkpoint can be read:\n.*says that its format is"):
        checkpointer(folder).load_latest(*make())


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
def test_crafted_metadata_runs_no_code(tmp_path: Path, craft: Callable[[Path, Path], None]) -> None:
    folder, evidence = copied(tmp_path), tmp_path / "evidence"
    craft(folder / STEP, evidence)
    amended(folder / STEP)
    with pytest.raises(UserError, match=CRAFTED[craft].replace(".", r"\.")):
        checkpointer(folder).load_latest(*make())
    assert not evidence.exists()


def test_crafted_value_runs_no_code(tmp_path: Path) -> None:
    folder, evidence = copied(tmp_path), tmp_path / "evidence"
    _rewrite_with(folder / STEP, Code(evidence))
    with pytest.raises(UserError, match=r"step_00000002 cannot be loaded into this run: Weights only load failed"):
        checkpointer(folder).load_latest(*make())
    assert not evidence.exists()


def _rewrite_with(folder: Path, value: object) -> None:
    """The checkpoint anew, as torch writes it, with a value that is code."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    net, optimizer, ema = make()
    model, state = get_state_dict(net, optimizer)
    state["param_groups"][0]["lr"] = value  # type: ignore[assignment, index, call-overload]
    content, _ = manifest.read(folder)
    shutil.rmtree(folder)
    save({"model": model, "optimizer": state, "ema": ema.state_dict()}, checkpoint_id=folder)
    names = [path.name for path in folder.iterdir()]
    manifest.write(folder, {**content, "files": manifest.checksums(folder, names)})
