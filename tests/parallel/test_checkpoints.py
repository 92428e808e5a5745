"""Checkpoints of several processes: sharded, with empty shards; what each has for itself; the thread that writes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.errors import SharedError
from lesam_dist.optim import SAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.train.checkpoint import Checkpointer, payload
from tests.checkpoints import read_checkpoint
from tests.parallel.processes import run


class Model(nn.Sequential):
    """Layers of fewer rows than there are processes, of two dtypes, and buffers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 2), nn.BatchNorm1d(2), nn.Linear(2, 7), nn.Linear(7, 1).to(torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("wide", torch.randn((), dtype=torch.float64))
        self.register_buffer("nothing", torch.zeros(0, 3))


def make(seed: int, shape: tuple[int, ...]) -> tuple[Model, SAM]:
    """A model and an optimizer with the same random state everywhere; on a mesh of this shape, if it has any."""
    torch.manual_seed(seed)
    net = Model()
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for part in [*net, net]:
            fully_shard(part, mesh=mesh)
    optimizer = SAM(net.parameters(), torch.optim.AdamW, lr=0.01, betas=(0.8, 0.95))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.base_optimizer.step()  # makes the state
    optimizer.zero_grad()
    for kept in optimizer.state_dict()["state"].values():
        for tensor in kept.values():
            local_shard(tensor).copy_(_cut_like(tensor, torch.randn(tensor.shape)))
    return net, optimizer


def _cut_like(tensor: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.dtype), tensor.device_mesh, tensor.placements).to_local()


def state_of(net: nn.Module, optimizer: SAM) -> dict[str, Tensor]:
    """Every tensor on this process."""
    state = {name: local_shard(tensor).clone() for name, tensor in net.state_dict().items()}
    for index, kept in optimizer.state_dict()["state"].items():
        state |= {f"{index}.{name}": local_shard(tensor).clone() for name, tensor in kept.items()}
    return state


def own_of(world: Distributed) -> dict[str, Tensor]:
    rank = float(world.rank)
    return {"mean": torch.full((3,), rank), "count": torch.tensor(world.rank), "none": torch.zeros(0)}


def save(world: Distributed, seed: int, folder: Path, shape: tuple[int, ...], how: str) -> dict[str, Tensor]:
    net, optimizer = make(seed, shape)
    expected = state_of(net, optimizer)
    checkpointer = Checkpointer(folder, world, CheckpointConfig(asynchronous=how))  # type: ignore[arg-type]
    for step in (1, 2, 3):  # the later ones with what the first has planned and staged
        own = own_of(world)
        assert checkpointer.save(step, net, optimizer, {"epoch": step}, own=own)
        if how == "always":
            with torch.no_grad():
                for tensor in (*net.state_dict().values(), *own.values()):
                    local_shard(tensor).fill_(1)
            net, optimizer = make(seed, shape)
    assert checkpointer.wait()
    return expected


def load(world: Distributed, seed: int, folder: Path, shape: tuple[int, ...]) -> tuple[Any, ...]:
    expected = state_of(*make(seed, shape))
    net, optimizer = make(seed + 1, shape)
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    loaded = Checkpointer(folder, world, CheckpointConfig()).load_latest(net, optimizer)
    assert loaded.damaged == []
    betas = optimizer.param_groups[0]["betas"]
    return loaded.progress, loaded.own, state_of(net, optimizer), expected, betas


# How it is saved, and where it is loaded: processes, and their mesh, if they have one.
Where = tuple[int, tuple[int, ...]]
ROUTES: list[tuple[str, Where, list[Where]]] = [
    ("never", (3, (3,)), [(2, (2,)), (1, ())]),
    ("always", (3, (3,)), [(3, (3,))]),
    ("always", (2, ()), [(2, ()), (1, ())]),
]


@pytest.mark.parametrize(("how", "source", "targets"), ROUTES)
def test_a_state_goes_from_any_number_of_processes_to_any(
    seed: int, tmp_path: Path, how: str, source: Where, targets: list[Where]
) -> None:
    """Bit for bit, and as it was when `save` was called, whatever happened to it afterwards."""
    world_size = source[0]
    saved = run(save, world_size, seed, tmp_path, source[1], how)
    for size, mesh in targets:
        for rank, (progress, own, state, expected, betas) in enumerate(run(load, size, seed, tmp_path, mesh)):
            assert (progress["step"], progress["world_size"]) == (3, world_size)
            torch.testing.assert_close(state, expected, rtol=0, atol=0)
            assert betas == (0.8, 0.95)
            assert type(betas) is tuple
            as_many = size == world_size
            mean = rank if as_many else (world_size - 1) / 2
            torch.testing.assert_close(own["mean"], torch.full((3,), float(mean)))
            assert own["count"] == (rank if as_many else 0)
            assert own["none"].shape == (0,)
    files = read_checkpoint(tmp_path / "step_00000003")
    for name in ("1.running_mean", "flags", "wide", "nothing"):
        torch.testing.assert_close(files["model"][name], saved[0][name], rtol=0, atol=0)


def save_replicas(world: Distributed, seed: int, folder: Path) -> None:
    config = CheckpointConfig(asynchronous="never")
    Checkpointer(folder, world, config).save(1, *make(seed, (2, 2)), {})


def test_replicas_are_saved_once(seed: int, tmp_path: Path) -> None:
    run(save_replicas, 4, seed, tmp_path)
    for _, _, state, expected, _ in run(load, 2, seed, tmp_path, (2,)):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
    sizes = [payload_bytes(path) for path in (tmp_path / "step_00000001").glob("*.safetensors")]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in state_of(*make(seed, ())).values())
    assert sum(sizes) == whole


def payload_bytes(path: Path) -> int:
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def fail_on_one(world: Distributed, seed: int, folder: Path, how: str) -> tuple[list[bool], list[str], str]:
    net, optimizer = make(seed, (2,))
    checkpointer = Checkpointer(folder, world, CheckpointConfig(asynchronous=how))  # type: ignore[arg-type]
    assert checkpointer.save(1, net, optimizer, {})
    assert checkpointer.wait()
    original, full = payload.write, threading.Event()

    def write(path: Path, tensors: Mapping[str, Tensor]) -> payload.Checksum:
        if world.rank == 1 and full.is_set():
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, tensors)

    payload.write = write
    full.set()
    began = [checkpointer.save(2, net, optimizer, {}), checkpointer.wait()]
    checkpointer.amend(2, {"evaluation": None})
    error = ""
    try:
        checkpointer.save(2, net, optimizer, {}, final=True)
    except SharedError as found:
        error = str(found)
    world.barrier()
    left = sorted(path.name for path in folder.iterdir())
    world.barrier()
    full.clear()
    assert checkpointer.save(3, net, optimizer, {})
    assert checkpointer.wait()
    return began, left, error


@pytest.mark.parametrize("how", ["never", "always"])
def test_one_rank_without_space_is_a_save_that_failed_for_all(seed: int, tmp_path: Path, how: str) -> None:
    expected = [how == "always", False]  # begun, and whether it is on disk
    for began, left, error in run(fail_on_one, 2, seed, tmp_path, how):
        assert began == expected
        assert left == ["latest", "step_00000001"]
        assert "checkpoint of step 2 could not be written" in error
        assert "No space left on device" in error
    assert (tmp_path / "latest").read_text() == "step_00000003"
