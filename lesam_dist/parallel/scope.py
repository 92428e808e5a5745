"""Over which processes a gradient is averaged before it perturbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["global", "local", "replica"]


def require_scope(method: str, scope: Scope, params: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a scope that the parameters' places do not allow."""
    from torch.distributed.tensor import DTensor  # here: a config is checked without torch

    from lesam_dist.parallel.shards import shard_axes

    if scope == "local" and any(shard_axes(p) is not None for p in params):
        raise RuntimeError(
            f"{method}: scope='local' needs each process to hold all weights, but some are sharded: their shards are "
            "one copy, which cannot be perturbed in several ways at once. Choose scope='global', or DDP."
        )
    if scope == "replica":
        if not any(isinstance(p, DTensor) for p in params):
            raise RuntimeError(
                f"{method}: scope='replica' needs replicas of shards, but no parameter is sharded. Choose "
                "scope='local' under DDP, or wrap(model, ..., 'hsdp', scope='replica')."
            )
        if any(isinstance(p, DTensor) and any(place.is_replicate() for place in p.placements) for p in params):
            raise RuntimeError(
                f"{method}: scope='replica', but the parameters' mesh holds the replicas too, so FSDP2 averages every "
                "gradient over them. Wrap with lesam_dist.parallel.wrap(model, ..., 'hsdp', scope='replica')."
            )
