"""How a network is spread over processes: the buckets and units that the trainer would make, from a config."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lesam_dist.config.schema import Config, ParallelConfig
from lesam_dist.errors import UserError
from lesam_dist.parallel.blocks import find_blocks
from lesam_dist.planning.communication import Layout, Unit
from lesam_dist.planning.machine import Machine
from lesam_dist.planning.profile import Profile


def layout_of(config: Config, profile: Profile, machine: Machine, processes: int) -> Layout:
    """The network of a config on so many processes.

    Raises:
        UserError: for a mesh of hsdp that they do not fill.
    """
    parallel, precision = config.parallel, config.precision
    strategy = parallel.strategy if processes > 1 else "none"
    shard, replicas = (processes, 1) if strategy == "fsdp" else (1, processes)
    if strategy == "hsdp":
        shard, replicas = _mesh(parallel, processes, machine.per_node)
    itemsize = 2 if precision.weights == "bf16" else 4
    gathered = 2 if precision.gather_dtype == "bf16" else itemsize
    blocks = find_blocks(profile.model, parallel.wrap_classes)
    units = units_of(profile.model, blocks, gathered, itemsize, keep=not parallel.reshard_after_forward)
    shapes = tuple(tuple(p.shape) for p in profile.model.parameters())
    return Layout(shapes, profile.found[0].order, units, strategy, shard, replicas, itemsize, machine.network.backend)


def _mesh(parallel: ParallelConfig, processes: int, per_node: int) -> tuple[int, int]:
    """Processes of a shard, and replicas, as `lesam_dist.parallel.wrap` finds them."""
    wanted = parallel.replicate_size
    shard = parallel.shard_size or (max(1, processes // wanted) if wanted else min(per_node, processes))
    replicas = wanted or max(1, processes // shard)
    if shard * replicas != processes:
        raise UserError(
            f"hsdp: {replicas} replicas of {shard} processes do not fill --gpus {processes}: choose "
            "--parallel.shard_size and --parallel.replicate_size to fit, or leave both out."
        )
    return shard, replicas


def units_of(
    model: nn.Module, blocks: Sequence[nn.Module], gather_itemsize: int, itemsize: int, keep: bool
) -> tuple[Unit, ...]:
    """The units of `lesam_dist.parallel.wrap`.

    Args:
        model: not wrapped.
        blocks: what it gathers as units.
        gather_itemsize, itemsize: bytes of an element as it is gathered, and as it is stored.
        keep: whether blocks stay gathered from forward to backward (``reshard_after_forward`` false).
    """
    index = {p: i for i, p in enumerate(model.parameters())}
    taken: set[int] = set()

    def members(modules: Sequence[nn.Module]) -> tuple[int, ...]:
        found = dict.fromkeys(index[p] for module in modules for p in module.parameters())
        own = tuple(i for i in found if i not in taken)
        taken.update(own)
        return own

    together = gather_itemsize != itemsize
    batchnorms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if together else []
    norms = Unit(members(batchnorms), None, itemsize, not keep)
    found = [Unit(members([block]), i, gather_itemsize, not keep) for i, block in enumerate(blocks)]
    root = Unit(tuple(i for i in index.values() if i not in taken), None, gather_itemsize, True)
    return tuple(unit for unit in (root, norms, *found) if unit.members)
