"""A model as the processes train it together: DDP, FSDP2 (`fully_shard`) or HSDP.

Under FSDP2 the shards of all ranks are one copy of the weights, so a perturbation is theirs in common: global, or under
HSDP one for each replica (`lesam_dist.parallel.replicas`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lesam_dist.errors import UserError
from lesam_dist.parallel.blocks import find_blocks
from lesam_dist.parallel.bucket_average import average_each
from lesam_dist.parallel.bucket_rounding import Rounding, round_buckets
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.replicas import average_over_replicas
from lesam_dist.parallel.scope import Scope

Strategy = Literal["none", "ddp", "fsdp", "hsdp"]


def wrap(
    model: nn.Module,
    world: Distributed,
    strategy: Strategy,
    *,
    shard_size: int | None = None,
    replicate_size: int | None = None,
    reshard_after_forward: bool = True,
    wrap_classes: Sequence[str] = (),
    scope: Scope = "global",
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model as these processes train it: wrapped by DDP, or sharded in place by FSDP2; unchanged for one process.

    Args:
        model: on the device, equal on every rank.
        world: this process among all.
        strategy: see `ParallelConfig`.
        shard_size, replicate_size: the mesh of "hsdp"; their product is the number of processes.
        reshard_after_forward: free gathered parameters after each forward.
        wrap_classes: class names of the units that are gathered together; empty takes the known blocks.
        scope: of the optimizer's perturbation; "replica" needs "hsdp", see `SharpnessAware`.
        gather_dtype: what FSDP2 gathers parameters in and computes with; the model's output is float32. Shards,
            gradients and their reduction, BatchNorm's parameters and statistics keep the model's dtype. None gathers
            in the model's dtype.
        reduce_dtype: what DDP averages float32 gradients in while its `Rounding` is switched on, as a pass that may
            round does; of no meaning to the others. None averages them as they are.

    Raises:
        UserError: a mesh that the processes do not fill, a class that the model does not have, or a parameter that
            FSDP2 cannot split.
    """
    if strategy == "none" and world.world_size > 1:
        raise UserError(f"parallel.strategy is none but {world.world_size} processes were started: choose ddp or fsdp.")
    if world.world_size == 1:
        return model
    if strategy == "ddp":
        return _ddp(model, world, reduce_dtype)
    if scope == "replica" and strategy != "hsdp":
        raise UserError(f"scope is replica but the strategy is {strategy}: only hsdp has replicas of shards.")
    _check_shardable(model)
    mesh = _mesh(world, strategy, shard_size, replicate_size)
    replicas = None
    if scope == "replica":
        mesh, replicas = mesh["shard"], mesh["replicate"]
    blocks = find_blocks(model, wrap_classes)
    if gather_dtype is not None:
        blocks = [block for block in blocks if not isinstance(block, _BatchNorm)]
        _shard_batchnorms(model, gather_dtype, mesh=mesh, reshard_after_forward=reshard_after_forward)
    for block in blocks:
        policy = _policy(gather_dtype)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The root too: left gathered after an evaluation, it would not see the next perturbation.
    policy = _policy(gather_dtype, output_dtype=None if gather_dtype is None else torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if replicas is not None:
        average_over_replicas(model, replicas.get_group())
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers parameters, so that every rank must run equally many."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let the next forward gather the parameters anew, after they were changed in place; of others nothing happens.

    An evaluation with reshard_after_forward=False leaves the old values gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _ddp(model: nn.Module, world: Distributed, reduce_dtype: torch.dtype | None) -> nn.Module:
    """BatchNorm statistics stay local: with two forwards a step a broadcast would run twice and still leave the ranks
    apart. The trainer averages them where they are used."""
    ids = [world.local_rank] if world.device.type == "cuda" else None
    # torch 2.14 renamed the switch and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    switch: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **switch)
    each = world.device.type == "cpu" and world.world_size > 2  # two addends have one order only
    if reduce_dtype is not None:
        round_buckets(wrapped, Rounding(reduce_dtype, world.world_size, each))
    elif each:
        wrapped.register_comm_hook(world.world_size, average_each)
    return wrapped


def hsdp_sizes(world: Distributed, shard_size: int | None, replicate_size: int | None) -> tuple[int, int]:
    """Replicas, and processes that share one, of "hsdp" with these settings of `ParallelConfig`.

    Raises:
        UserError: where they do not fill the processes.
    """
    processes = world.world_size
    shard = shard_size or (processes // replicate_size if replicate_size else min(world.local_world_size, processes))
    replicate = replicate_size or processes // shard
    if shard * replicate != processes:
        sizes = {"shard_size": shard_size, "replicate_size": replicate_size}
        given = " and ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size is not None)
        raise UserError(
            f"{given or f'one shard for the {shard} processes of a node'}: that does not fit {processes} processes. "
            "Shards times replicas must be their number; null takes what the other leaves."
        )
    return replicate, shard


def _mesh(world: Distributed, strategy: Strategy, shard_size: int | None, replicate_size: int | None) -> DeviceMesh:
    if strategy == "fsdp":
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    sizes = hsdp_sizes(world, shard_size, replicate_size)
    return init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicate", "shard"))


def _policy(gather_dtype: torch.dtype | None, output_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """float32 reductions whatever is gathered: the perturbation's norm comes from these gradients."""
    reduce_dtype = None if gather_dtype is None else torch.float32
    return MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=reduce_dtype, output_dtype=output_dtype)


def _shard_batchnorms(model: nn.Module, gather_dtype: torch.dtype, **options: Any) -> None:
    """Shard all BatchNorm layers as one unit, with one all-gather, in the dtype of their running statistics."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if layers:
        policy = MixedPrecisionPolicy(output_dtype=gather_dtype, cast_forward_inputs=False)
        fully_shard(layers, mp_policy=policy, **options)


def _check_shardable(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 0:
            raise UserError(f"FSDP2 cannot split the scalar parameter '{name}': give it one dimension, or choose ddp.")
        if not p.is_contiguous():
            raise UserError(
                f"FSDP2 cannot split '{name}', whose memory is not contiguous (strides {p.stride()}): make "
                "it contiguous (channels_last images alone do for convolutions), or choose ddp."
            )
