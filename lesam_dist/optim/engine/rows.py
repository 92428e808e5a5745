"""The parameters of an optimizer as parallel lists, built once and kept until they change.

Per step only the gradients are read anew. A list of rows holds parameters on one device that are split over the
same mesh axes: one norm, one all-reduce, one set of launches.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lesam_dist.parallel.shards import ShardAxes, local_shard, local_shards, shard_axes

Gradients = list[Tensor | None]

_GRAD = operator.attrgetter("grad")


@dataclass
class Rows:
    """Row i is ``params[i]``; the lists run in parallel.

    Attributes:
        device: of all of them.
        axes: the mesh axes that they are split over; None for whole tensors.
        params: as in ``param_groups``.
        shards: what this process stores of each and the step writes; a plain Parameter itself.
        groups: the index of each one's param group.
        perturbed: whether the group takes part in norm and perturbation.
        copies: the saved weights; allocated when first needed, then reused.
        kept: the first gradients, for updates that need them; None where not kept.
        dtensors: whether any parameter is a DTensor; a replicated one has no axes.
    """

    device: torch.device
    axes: ShardAxes | None
    params: list[Tensor] = field(default_factory=list)
    shards: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    perturbed: list[bool] = field(default_factory=list)
    copies: list[Tensor | None] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    dtensors: bool = False

    def gradients(self) -> Gradients:
        """The current gradients, as shards; None where there is none. Not kept: the caller zeroes them when done."""
        grads: Gradients = list(map(_GRAD, self.params))
        return local_shards(grads) if self.dtensors else grads


class RowCache:
    """The rows of all param groups, rebuilt only when a group's members, storages or `perturb` changed."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self._params: list[Tensor] = []
        self._addresses: list[int] = []
        self._perturb: list[bool] = []
        self._dtensors = False

    def refresh(self, param_groups: list[dict[str, Any]]) -> bool:
        """Bring the rows up to date; returns whether they are new objects."""
        params = [p for group in param_groups for p in group["params"]]
        perturb = [bool(group["perturb"]) for group in param_groups]
        same = len(params) == len(self._params) and all(map(operator.is_, params, self._params))
        # Through `.data = ` or `.to()` a parameter keeps its identity and gets another storage.
        if same and perturb == self._perturb and _addresses(params, self._dtensors) == self._addresses:
            return False
        self._params, self._perturb = params, perturb
        self._dtensors = any(isinstance(p, DTensor) for p in params)
        self._addresses = _addresses(params, self._dtensors)
        _require_own_storages(params, self._addresses)
        self.rows = _build(param_groups)
        return True


def _addresses(params: list[Tensor], dtensors: bool) -> list[int]:
    """Of their shards; ``dtensors``: whether any of them is one."""
    return list(map(Tensor.data_ptr, local_shards(params) if dtensors else params))


def _require_own_storages(params: list[Tensor], addresses: list[int]) -> None:
    """Raise ValueError where two parameters are the same memory: the second copy would be of perturbed weights."""
    seen: dict[int, Tensor] = {}
    for p, address in zip(params, addresses, strict=True):
        if address and local_shard(p).numel() and seen.setdefault(address, p) is not p:
            raise ValueError(
                f"two parameters, of shapes {tuple(seen[address].shape)} and {tuple(p.shape)}, are the same memory: it "
                "would be perturbed twice and not come back exactly. Tie weights by one Parameter, a.weight = b.weight."
            )


def _build(param_groups: list[dict[str, Any]]) -> list[Rows]:
    by_place: dict[Any, Rows] = {}
    for index, group in enumerate(param_groups):
        for p in group["params"]:
            axes = shard_axes(p)
            rows = by_place.setdefault((p.device, axes), Rows(p.device, axes))
            rows.dtensors |= isinstance(p, DTensor)
            rows.params.append(p)
            rows.shards.append(local_shard(p).detach() if isinstance(p, DTensor) else p)
            rows.groups.append(index)
            rows.perturbed.append(bool(group["perturb"]))
            rows.copies.append(None)
            rows.kept.append(None)
    return list(by_place.values())
