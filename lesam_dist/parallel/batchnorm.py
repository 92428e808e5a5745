"""BatchNorm over the samples of all processes."""

from __future__ import annotations

from torch import nn

from lesam_dist.errors import SharedError
from lesam_dist.parallel.processes import Distributed


def synchronized(model: nn.Module, world: Distributed) -> nn.Module:
    """The model with torch's `SyncBatchNorm` for each BatchNorm; itself on one process. Names and tensors stay.

    Call it before the model is compiled or wrapped.

    Raises:
        SharedError: on CPUs, where torch's does not work.
    """
    if world.world_size == 1:
        return model
    if world.device.type == "cpu":
        raise SharedError(
            f"parallel.sync_batchnorm is true but these {world.world_size} processes train on CPUs, where torch's "
            "SyncBatchNorm does not work: set it to false, or train on GPUs."
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted
