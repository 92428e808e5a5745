"""A model as the processes train it together: DDP, FSDP2 (`fully_shard`) or HSDP.

Perturbation is global under every strategy: one from the gradient averaged over all processes. Under FSDP2 nothing
else is possible, since the shards of all ranks are one copy of the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lesam_dist.errors import UserError, unknown_name
from lesam_dist.parallel import Distributed

Strategy = Literal["none", "ddp", "fsdp", "hsdp"]

# torchvision's residual and transformer blocks, which the models of this package use too.
_BLOCKS = ("BasicBlock", "Bottleneck", "EncoderBlock", "SwinTransformerBlock", "CNBlock")


def wrap(
    model: nn.Module,
    here: Distributed,
    strategy: Strategy,
    *,
    shard_size: int | None = None,
    replicate_size: int | None = None,
    reshard_after_forward: bool = True,
    wrap_classes: Sequence[str] = (),
) -> nn.Module:
    """The model as trained by these processes; alone, the model itself (FSDP2 changes it in place).

    Args:
        model: on the device, equal on every rank.
        here: this process among all.
        strategy: see `ParallelConfig`.
        shard_size, replicate_size: the mesh of "hsdp"; their product is the number of processes.
        reshard_after_forward: free gathered parameters after each forward.
        wrap_classes: class names of the units that are gathered together; empty takes the known blocks.

    Raises:
        UserError: a mesh that the processes do not fill, a class that the model does not have, or a parameter that
            FSDP2 cannot split.
    """
    if strategy == "none" and here.world_size > 1:
        raise UserError(f"parallel.strategy is none but {here.world_size} processes were started: choose ddp or fsdp.")
    if here.world_size == 1:
        return model
    if strategy == "ddp":
        return _ddp(model, here)
    _check_shardable(model)
    mesh = _mesh(here, strategy, shard_size, replicate_size)
    for block in _units(model, wrap_classes):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    # The root too: left gathered after an evaluation, it would not see the next perturbation.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers parameters, so that every rank must run equally many."""
    return isinstance(model, FSDPModule)


def _ddp(model: nn.Module, here: Distributed) -> nn.Module:
    """BatchNorm statistics stay local: with two forwards a step a broadcast would run twice and still leave the ranks
    apart. The trainer averages them where they are used."""
    ids = [here.local_rank] if here.device.type == "cuda" else None
    # torch 2.14 renamed the switch and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    switch: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **switch)


def _mesh(here: Distributed, strategy: Strategy, shard_size: int | None, replicate_size: int | None) -> DeviceMesh:
    world = here.world_size
    if strategy == "fsdp":
        return init_device_mesh(here.device.type, (world,), mesh_dim_names=("shard",))
    shard = shard_size or (world // replicate_size if replicate_size else min(here.local_world_size, world))
    replicate = replicate_size or world // shard
    if shard * replicate != world:
        raise UserError(
            f"parallel.shard_size {shard} x parallel.replicate_size {replicate} is not the number of processes, "
            f"{world}: choose sizes whose product it is."
        )
    return init_device_mesh(here.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def _units(model: nn.Module, wrap_classes: Sequence[str]) -> list[nn.Module]:
    present = {type(module).__name__ for module in model.modules()}
    for name in wrap_classes:
        if name not in present:
            raise unknown_name("class in parallel.wrap_classes", name, present)
    names = set(wrap_classes or _BLOCKS)
    return [module for module in model.modules() if type(module).__name__ in names]


def _check_shardable(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 0:
            raise UserError(f"FSDP2 cannot split the scalar parameter '{name}': give it one dimension, or choose ddp.")
        if not p.is_contiguous():
            raise UserError(
                f"FSDP2 cannot split '{name}', whose memory is not contiguous (strides {p.stride()}): set "
                "precision.channels_last to false, or choose ddp."
            )
