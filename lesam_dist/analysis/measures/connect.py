"""Linear mode connectivity: the loss on the straight line between the weights of two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.points import each_once
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.source import misfit

BATCHNORM = ("estimate", "interpolate")


@dataclass(frozen=True)
class Curve:
    """A number along the path, None where the loss is not finite.

    Attributes:
        values: at each place.
        ends: at the two checkpoints, with BatchNorm's statistics that are in them.
    """

    values: list[float | None]
    ends: list[float | None]

    def barrier(self, places: Sequence[float]) -> tuple[float, float] | None:
        """``max_a [L(a) - ((1 - a) L(0) + a L(1))]`` and the first a that has it; None where a value is missing.

        It is never below zero, as the ends have zero.
        """
        known = [value for value in self.values if value is not None]
        if len(known) < len(self.values):
            return None
        rise = known[-1] - known[0]
        # From the nearer end, so that rounding raises neither the ends nor a level line.
        line = [known[0] + a * rise if a < 0.5 else known[-1] - (1 - a) * rise for a in places]
        above = [value - on_line for value, on_line in zip(known, line, strict=True)]
        highest = max(above)
        return highest, places[above.index(highest)]


@dataclass(frozen=True)
class Connection:
    """What `connect` has found.

    Attributes:
        places: a from 0 (the first checkpoint) to 1 (the second).
        loss: mean over the images.
        error: share of the images that are classified wrongly, in per cent.
        batchnorm: where its statistics along the path are from; None for a model without.
        nonfinite: places at which the loss is not finite.
    """

    places: list[float]
    loss: Curve
    error: Curve
    batchnorm: str | None
    nonfinite: int

    def numbers(self) -> dict[str, Any]:
        """For JSON, with the barriers."""
        barriers = {f"{name}_barrier": getattr(self, name).barrier(self.places) for name in ("loss", "error")}
        found = {name: b and {"height": b[0], "place": b[1]} for name, b in barriers.items()}
        return asdict(self) | found


def connect(
    objective: Objective,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    *,
    points: int = 21,
    batchnorm: str = "estimate",
    world: Distributed | None = None,
    journal: Journal | None = None,
    on_point: Callable[[int], None] | None = None,
) -> Connection:
    """Loss and error rate at the weights ``(1 - a) w_A + a w_B`` for a from 0 to 1.

    Two forwards over the images a place, of which one is for BatchNorm's statistics, and one for each checkpoint as it
    is. The model is as before afterwards, bit for bit.

    Args:
        objective: the loss, over the model that the weights are put into; with a ``world`` of several processes, each
            has one of its own with all the images (``load(..., whole=True)``).
        first: state_dict of A; may be the model's own.
        second: the same of B.
        points: places, at equal distances.
        batchnorm: "estimate" takes statistics anew at each place, see `Objective.estimate_batchnorm`: averages of
            two networks' statistics are not those of the averaged network, which looks worse with them than it is.
            "interpolate" averages them.
        world: processes that share the places; None: this one makes all.
        journal: keeps places that are done, for the next try; None keeps nothing.
        on_point: called with the number of places that are known so far, the checkpoints themselves among them.

    Raises:
        UserError: for weights that are not of the model, or a number out of range.
        ValueError: for an objective over shares of the images, beside processes that share the places.
    """
    check(points, batchnorm)
    if world is not None and world.world_size > 1 and objective.world.world_size > 1:
        raise ValueError("each process needs an objective of its own, with all the images, to share the places")
    model = objective.model
    for which, weights in (("first", first), ("second", second)):
        if wrong := misfit(model.state_dict(), weights):
            raise UserError(f"the {which} weights are not of this model: {wrong}.")
    # Copies: the model, whose own tensors these may be, is about to change.
    a, b = ({name: tensor.detach().clone() for name, tensor in weights.items()} for weights in (first, second))
    places = [i / (points - 1) for i in range(points)]
    estimated = batchnorm == "estimate"
    names = ["first", "second", *(f"place {i}" for i in range(points))]

    def at(i: int) -> tuple[float | None, float | None]:
        model.load_state_dict(a if i == 0 else b if i == 1 else _between(a, b, places[i - 2]))
        if estimated and i > 1:
            objective.estimate_batchnorm()
        loss, error = objective.loss_and_error()
        return (loss, error) if math.isfinite(loss) else (None, None)

    with _restored(model):
        found = each_once(names, at, world, journal, on_point)
    loss, error = (Curve([each[k] for each in found[2:]], [each[k] for each in found[:2]]) for k in (0, 1))
    used = batchnorm if objective.batchnorms() else None
    return Connection(places, loss, error, used, sum(value is None for value in loss.values))


def check(points: int, batchnorm: str) -> None:
    """Raise a `UserError` for what `connect` cannot use."""
    if points < 2:
        raise UserError(f"points is {points}: a path needs at least its 2 ends.")
    if batchnorm not in BATCHNORM:
        raise UserError(f"batchnorm is '{batchnorm}': choose one of {', '.join(BATCHNORM)}.")


def _between(a: Mapping[str, Tensor], b: Mapping[str, Tensor], place: float) -> dict[str, Tensor]:
    """What is not real, such as counts of batches, is A's. lerp gives the ends exactly."""
    return {
        name: torch.lerp(tensor, b[name].to(tensor), place) if tensor.is_floating_point() else tensor
        for name, tensor in a.items()
    }


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers as they were, afterwards."""
    tensors = [*chain(model.parameters(), model.buffers())]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
