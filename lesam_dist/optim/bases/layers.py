"""Layers as the layer-wise optimizers see them: the parameters of a group side by side, and the norms of whole layers.

A layer is a parameter. Under FSDP2 and HSDP this process has a shard of it, perhaps an empty one: the squares of all
layers are summed over the shards in one reduction, and no host waits for a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lesam_dist.optim.engine import capturing, reference
from lesam_dist.parallel.shards import ShardAxes, local_shard, reduce_over_shards, shard_axes


@dataclass
class Layers:
    """Those parameters of a param group that have a gradient, of one dtype, on one device, split in one way.

    Attributes:
        group: their param group.
        axes: the mesh axes that they are split over; None for whole tensors.
        adapted: whether their step gets its length from their norm.
        params: as in the group; the other lists run in parallel.
        shards, grads: what this process has of weights and gradients.
    """

    group: dict[str, Any]
    axes: ShardAxes | None
    adapted: bool
    params: list[Tensor] = field(default_factory=list)
    shards: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)


def layers_of(param_groups: list[dict[str, Any]]) -> list[Layers]:
    """All parameters that have a gradient; each group's ``adapt`` says which are adapted.

    True or False, or None: those of two dims and more, so that biases and the weights of normalisation layers are not.
    """
    found: dict[Any, Layers] = {}
    for index, group in enumerate(param_groups):
        for p in group["params"]:
            if p.grad is None:
                continue
            adapted = p.ndim > 1 if group["adapt"] is None else bool(group["adapt"])
            axes = shard_axes(p)
            key = (index, p.dtype, p.device, axes, adapted)
            own = found.setdefault(key, Layers(group, axes, adapted))
            shard, grad = local_shard(p).detach(), local_shard(p.grad)
            if grad.stride() != shard.stride():  # torch's fused kernels go through memory, not through indices
                grad = torch.empty_like(shard).copy_(grad)
            own.params.append(p)
            own.shards.append(shard)
            own.grads.append(grad)
    return list(found.values())


def state_of(layers: Layers, state: dict[Tensor, Any], name: str) -> list[Tensor]:
    """This process's part of a state tensor of each parameter, zeros where it is missing.

    ``step`` is a count for each, float32 0-d on the parameter's device; any other has the parameter's shape, dtype and
    placement, so that it is resharded with it.
    """
    found = []
    for p in layers.params:
        own = state[p]
        if own.get(name) is None:
            capturing.refuse_new_state(p.device, f"the base optimizer's {name}")
            own[name] = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
        elif name == "step" and own[name].device != p.device:  # as a checkpoint may have it
            own[name] = own[name].to(p.device)
        found.append(local_shard(own[name]).detach())
    return found


def norms(layers: Sequence[Layers], *lists: Sequence[list[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The norms of whole layers, from this process's shards: one reduction for each set of mesh axes.

    Args:
        layers: N of them.
        lists: each has N lists of tensors, parallel to the parameters of ``layers``: the weights, the gradients, ...

    Returns:
        For each of ``layers`` as many tensors as there are ``lists``, float64 with one norm for each parameter.
    """
    places: dict[Any, list[int]] = {}
    for index, own in enumerate(layers):
        places.setdefault((own.shards[0].device, own.axes), []).append(index)
    found: dict[int, tuple[Tensor, ...]] = {}
    for (_, axes), members in places.items():
        parts = [_sums_of_squares(tensors[index]) for index in members for tensors in lists]
        whole = reduce_over_shards(torch.cat(parts), axes).sqrt_()
        split = whole.split([len(part) for part in parts])
        for turn, index in enumerate(members):
            found[index] = tuple(split[turn * len(lists) : (turn + 1) * len(lists)])
    return [found[index] for index in range(len(layers))]


def _sums_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of each tensor by itself, (n,) float64, accumulated in at least float32; its bits depend on the values alone.

    On the CPU that takes `reference`'s order of adding; a GPU's multi-tensor kernel has a fixed one.
    """
    if tensors[0].device.type == "cpu":
        return torch.stack([reference.sum_sq([tensor]) for tensor in tensors])
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).double().square_()
