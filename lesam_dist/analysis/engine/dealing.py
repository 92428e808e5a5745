"""Batches of a size of one's own choice, out of images that the processes hold in batches of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.errors import UserError


@dataclass(frozen=True)
class Dealt:
    """This process's share of the batches.

    Attributes:
        first: place of its first batch among those of all processes.
        batches: its own; each is a list of parts that are computed one after the other.
        count: batches of all processes.
        left_out: images that did not fill a batch.
        most: batches of the process that has most.
    """

    first: int
    batches: list[list[Batch]]
    count: int
    left_out: int
    most: int


def deal(objective: Objective, size: int, seed: int = 0, at_once: int | None = None) -> Dealt:
    """Shuffle the images of all processes, and cut them into batches of ``size`` images each.

    Images in folders lie class by class, and a batch of one class has another sharpness: so they are shuffled. The
    order is a function of ``seed`` and of the number of images alone, and batch i has the i-th ``size`` of them: no
    number of processes changes which images are in which batch, as long as rank 0's images, rank 1's, ... behind each
    other are the same, as an evaluation's are. A smaller size cuts the same order into smaller pieces. Images that do
    not fill a last batch are left out.

    Each process sends all of its images to all others once, a batch at a time, and keeps what is its own.

    Args:
        objective: has the images; all of one shape.
        size: images of a batch.
        seed: of the order.
        at_once: images of a part; None makes one part of a batch.

    Raises:
        UserError: ``size`` is more than there are images.
    """
    check_size("a batch", size, objective.samples)
    world = objective.world
    order = np.random.default_rng([seed, 128]).permutation(objective.samples)
    count = objective.samples // size
    ends = [rank * count // world.world_size for rank in range(world.world_size + 1)]
    first, last = ends[world.rank], ends[world.rank + 1]
    chosen = order[first * size : last * size]
    place = torch.full((objective.samples,), -1)
    place[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    images, labels = (torch.empty(len(chosen), *t.shape[1:], dtype=t.dtype, device=t.device) for t in _first(objective))
    begin = 0
    lengths = world.gather([len(labels) for _, labels in objective.batches])
    for rank, held in enumerate(lengths):
        for index, length in enumerate(held):
            batch = objective.batches[index] if rank == world.rank else None
            here = place[begin : begin + length].to(objective.device)
            kept = here >= 0
            for whole, target in zip(_sent(objective, batch, length, rank), (images, labels), strict=True):
                target[here[kept]] = whole[kept]
            begin += length
    part = at_once or size
    batches = [
        list(zip(x.split(part), y.split(part), strict=True))
        for x, y in zip(images.split(size), labels.split(size), strict=True)
    ]
    most = -(-count // world.world_size)
    return Dealt(first, batches[: last - first], count, objective.samples - count * size, most)


def check_size(what: str, size: int, samples: int | None) -> None:
    """Raise a `UserError` unless ``samples`` images, None: not known yet, make a batch of ``size``."""
    if size < 1:
        raise UserError(f"{what} is of {size} images: it must have at least 1.")
    if samples is not None and size > samples:
        raise UserError(f"{what} is of {size} images, but there are {samples}: take more images, or smaller batches.")


def _first(objective: Objective) -> Batch:
    return objective.batches[0]


def _sent(objective: Objective, batch: Batch | None, length: int, source: int) -> list[Tensor]:
    """The batch that rank ``source`` has, on every rank."""
    found = []
    for position, like in enumerate(_first(objective)):
        if batch is not None:
            tensor = batch[position].contiguous()
        else:
            tensor = torch.empty(length, *like.shape[1:], dtype=like.dtype, device=like.device)
        if objective.world.world_size > 1:
            dist.broadcast(tensor, src=source)
        found.append(tensor)
    return found
