"""HSDP for ``scope="replica"``: each replica perturbs by the gradient of its own processes.

FSDP2's own HSDP averages every gradient over the replicas and cannot leave that out for one pass: with
``set_requires_all_reduce(False)`` it keeps the gradient back and adds it to the next one. So parameters are sharded
over the processes of a replica alone, and FSDP2's hook after the reduce-scatter averages over the replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

Sync = bool | Literal["replica"]


class ReplicaAverage:
    """Averages gradients over the replicas; may be switched off for a pass.

    Args:
        group: the processes that hold the same shard, one of each replica.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self._enabled = True

    def __call__(self, gradient: Tensor) -> None:
        """FSDP2 calls it with the reduce-scattered gradients of a unit, flat, on its communication stream."""
        if self._enabled:
            dist.all_reduce(gradient, group=self._group)
            gradient /= self._size

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Inside, averaging is on or off."""
        before, self._enabled = self._enabled, enabled
        try:
            yield
        finally:
            self._enabled = before


def average_over_replicas(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Average the gradients of a model, which FSDP2 shards within each replica, over ``group``."""
    average = ReplicaAverage(group)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)
    model._replica_average = average  # type: ignore[assignment]  # where `replica_average` finds it


def replica_average(model: nn.Module) -> ReplicaAverage | None:
    """What `average_over_replicas` gave this model; None for any other."""
    average: ReplicaAverage | None = getattr(model, "_replica_average", None)
    return average
