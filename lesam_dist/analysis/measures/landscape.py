"""The loss on a line or a plane through the weights, along filter-normalised directions (Li et al. 2018)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.points import each_once
from lesam_dist.analysis.engine.randomness import normal
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed

_TINY = 1e-10  # Li et al.'s, beside the norm of a filter of a direction


@dataclass(frozen=True)
class Landscape:
    """What `landscape` has found.

    Attributes:
        coordinates: along each direction, (points,).
        losses: float64, (points,) for each direction: ``losses[i, j]`` is at coordinate i along the first direction
            and j along the second; nan where the loss is not finite.
        nonfinite: how many are not.
    """

    coordinates: list[float]
    losses: NDArray[np.float64]
    nonfinite: int


def landscape(
    objective: Objective,
    directions: Sequence[Tensor],
    coordinates: Sequence[float],
    *,
    world: Distributed | None = None,
    journal: Journal | None = None,
    name: str = "landscape",
    on_point: Callable[[int], None] | None = None,
) -> Landscape:
    """``L(w + a_1 d_1 + ... + a_D d_D)`` for all a on a grid around the weights w that the model has.

    BatchNorm keeps the statistics of w. One forward over the images a point. Weights are as before afterwards, bit for
    bit.

    Args:
        objective: the loss; with a ``world`` of several processes, each has one of its own with all the images
            (``load(..., whole=True)``).
        directions: D vectors (size,), as of `filter_normalised`.
        coordinates: along each of them.
        world: processes that share the points; None: this one makes all.
        journal: keeps points that are done, for the next try; None keeps nothing.
        name: of these points in the journal, which may hold others'.
        on_point: called with the number of points that are known so far.

    Raises:
        UserError: there is no direction or no coordinate.
        ValueError: for an objective over shares of the images, beside processes that share the points.
    """
    if not directions or not len(coordinates):
        raise UserError("a landscape needs at least one direction and one coordinate.")
    if world is not None and world.world_size > 1 and objective.world.world_size > 1:
        raise ValueError("each process needs an objective of its own, with all the images, to share the points")
    points = list(itertools.product(coordinates, repeat=len(directions)))
    centre = objective.weights()

    def loss(i: int) -> float | None:
        weights = centre.clone()
        for a, direction in zip(points[i], directions, strict=True):
            weights.add_(direction, alpha=a)
        with objective.at(weights):
            value = objective.loss()
        return value if math.isfinite(value) else None

    names = [f"{name} {i}" for i in range(len(points))]
    found = each_once(names, loss, world, journal, on_point)
    losses = np.array([math.nan if value is None else value for value in found], dtype=np.float64)
    shape = [len(coordinates)] * len(directions)
    return Landscape([float(a) for a in coordinates], losses.reshape(shape), sum(value is None for value in found))


@torch.no_grad()
def filter_normalised(objective: Objective, seed: int, index: int) -> Tensor:
    """A random direction whose every filter is as long as the weights', (size,).

    Numbers are standard normal, by the seed, the index and the parameter's name: the same for all checkpoints of one
    model, all devices and any number of processes. Each filter ``d_f``, which is the part of a tensor with one first
    index, becomes ``d_f ||w_f|| / (||d_f|| + 1e-10)``. Tensors with fewer than two dims, such as biases and BatchNorm's
    scales, get zeros: Section 4 of Li et al. 2018, and the "biasbn" of their code.

    Args:
        objective: whose weights set the lengths.
        seed: not negative.
        index: of the direction.
    """
    parts = []
    for name, p in objective.model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2:
            parts.append(torch.zeros_like(p).flatten())
            continue
        rows = normal(p.numel(), p, seed, f"landscape {name}", index).view(len(p), -1)
        lengths = p.flatten(1).norm(dim=1, keepdim=True)
        parts.append((rows * (lengths / (rows.norm(dim=1, keepdim=True) + _TINY))).flatten())
    return torch.cat(parts)


def grid(points: int, reach: float) -> list[float]:
    """So many coordinates from ``-reach`` to ``reach``, at equal distances.

    Raises:
        UserError: for fewer than two points, or a reach that is not above zero.
    """
    if points < 2:
        raise UserError(f"points is {points}: a grid needs at least 2 along each direction.")
    if not 0 < reach < math.inf:
        raise UserError(f"range is {reach:g}: it must be above 0, as 1 is the weights' own length.")
    half = (points - 1) / 2
    return [reach * ((i - half) / half) for i in range(points)]  # the middle of an odd number is 0 exactly
