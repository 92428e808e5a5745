"""Processes and meshes: who holds which part of a tensor, and over which group a sum must run.

Vocabulary: mesh things are axes, tensor things are dims.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lesam_dist.errors import UserError

ShardAxes = tuple[DeviceMesh, tuple[int, ...]]


@dataclass(frozen=True)
class Distributed:
    """This process among all of them. Alone, it is rank 0 of 1 and no process group exists."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1  # processes on this node

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the terminal."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def mean(self, values: Sequence[Tensor]) -> list[float]:
        """Average 0-d tensors over the processes and read them; one collective, one host sync."""
        stacked = torch.stack([value.detach().double() for value in values])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked /= self.world_size
        return [float(value) for value in stacked.tolist()]


@contextmanager
def process_group(device: str | None = None) -> Iterator[Distributed]:
    """Join the processes that torchrun (or accelerate launch) started, and leave them at the end.

    The launcher's environment decides: RANK, LOCAL_RANK, WORLD_SIZE. Without it this is a single process. Each
    process takes one GPU (NCCL), or the CPU where there is none (gloo).

    Args:
        device: "cpu" or "cuda"; None takes a GPU where there is one.

    Raises:
        UserError: for more local processes than GPUs, or "cuda" on a host without one.
    """
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    use_cuda = torch.cuda.is_available() if device is None else device == "cuda"
    if use_cuda:
        count = torch.cuda.device_count()
        if local_rank >= count:
            remedy = f"Start at most {count} processes per node, or train" if count else "Train"
            raise UserError(
                f"local rank {local_rank} has no GPU: this host shows {count}. {remedy} on the CPU with "
                "--parallel.device cpu."
            )
        torch.cuda.set_device(local_rank)
    target = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    here = Distributed(rank, local_rank, world_size, target, local_world_size)
    if world_size == 1:
        yield here
        return
    dist.init_process_group("nccl" if use_cuda else "gloo", device_id=target if use_cuda else None)
    try:
        yield here
        dist.barrier()  # a rank that leaves early breaks the others' connections
    finally:
        if not use_cuda:
            # Gloo's threads drop the tensors of their last collective a little after it is done, and need the
            # interpreter for that. DTensor's caches keep the group alive, so nothing joins them, and one that comes
            # while the interpreter shuts down aborts the process ("terminate called without an active exception"):
            # 7 of 50 exits under FSDP2 with torch 2.14, 0 of 80 after this wait.
            time.sleep(0.2)
        dist.destroy_process_group()


def local_shard(tensor: Tensor) -> Tensor:
    """What this process stores of a tensor: a DTensor's shard (writes go through), a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_axes(tensor: Tensor) -> ShardAxes | None:
    """The mesh and those of its axes that a tensor is split over; None for a tensor that is whole on each rank.

    Replicated axes (DDP, the outer axis of HSDP) are left out: their gradients are already averages, and a sum
    over them would count every element once per replica.
    """
    if not isinstance(tensor, DTensor):
        return None
    axes = tuple(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
    return (tensor.device_mesh, axes) if axes else None


def reduce_over_shards(value: Tensor, axes: ShardAxes | None) -> Tensor:
    """Sum a per-rank scalar over the shards, so that every rank has the whole tensor's value."""
    if axes is not None:
        mesh, mesh_axes = axes
        for axis in mesh_axes:
            dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def reduce_max(value: Tensor) -> None:
    """The largest of all processes' values, in place; alone, the value itself."""
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
