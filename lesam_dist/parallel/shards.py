"""Who holds which part of a tensor, and over which group a sum must run.

Vocabulary: mesh things are axes, tensor things are dims.
"""

from __future__ import annotations

import operator
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

ShardAxes = tuple[DeviceMesh, tuple[int, ...]]

T = TypeVar("T", Tensor, Tensor | None)

_LOCAL = operator.attrgetter("_local_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """What this process stores of a tensor: a DTensor's shard (writes go through), a plain tensor itself.

    No part of autograd. Not `to_local`, which makes a view of each Parameter, at ten times the cost and more.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_shards(tensors: list[T]) -> list[T]:
    """`local_shard` of each, None of None; quick where all of them are DTensors."""
    try:
        return list(map(_LOCAL, tensors))
    except AttributeError:
        return [None if tensor is None else local_shard(tensor) for tensor in tensors]


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, which this process has all of, that it stores of ``like``: a view."""
    if not isinstance(like, DTensor):
        return whole
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):  # as torch.chunk cuts, where the last processes may have nothing
            parts = whole.chunk(like.device_mesh.size(axis), placement.dim)
            place = like.device_mesh.get_local_rank(axis)
            whole = parts[place] if place < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


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
    """Make a value the largest of all processes' values, in place; a single process keeps its own."""
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
