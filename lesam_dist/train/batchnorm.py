"""BatchNorm in two passes: statistics that stand still in the second, and equal ones on all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from lesam_dist.parallel.processes import Distributed


@contextmanager
def frozen_batchnorm(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with the batch as in training, but its running statistics stand still. Re-entrant.

    `num_batches_tracked` stands still too, unlike with the usual ``momentum = 0``, so that a cumulative average
    (``momentum=None``) is not disturbed either.
    """
    layers = list(batchnorms(model))
    tracked = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, value in zip(layers, tracked, strict=True):
            layer.track_running_stats = value


def batchnorms(model: nn.Module) -> Iterable[_BatchNorm]:
    """Every BatchNorm layer (1d, 2d, 3d, Sync) of a model."""
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


@torch.no_grad()
def average_batchnorm(model: nn.Module, world: Distributed) -> None:
    """Give every rank the mean of all ranks' running means and variances, in one collective."""
    buffers = [b for layer in batchnorms(model) for b in (layer.running_mean, layer.running_var) if b is not None]
    average_over_ranks(buffers, world)


def average_over_ranks(tensors: list[Tensor], world: Distributed) -> None:
    """Give every rank the mean of all ranks' tensors, in place and in one collective."""
    if world.world_size > 1:
        average_over(tensors, None)


@torch.no_grad()
def average_over(tensors: list[Tensor], group: ProcessGroup | None) -> None:
    """Give every process of a group the mean of their tensors, in place and in one collective; None: of all."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view(tensor.shape))
