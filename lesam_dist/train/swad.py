"""SWAD: the mean of the weights after every step of the valley that the validation loss is in (Cha et al., 2021).

The steps between two evaluations are a segment, and L_i the validation loss after segment i. The valley begins with the
first segment s whose loss is the lowest of it and the ``converge - 1`` segments that follow. With

    threshold = (1 + tolerance_ratio) (L_s + ... + L_(s + converge - 1)) / converge

it reaches to the last segment whose loss is not above the threshold, and no further once ``tolerance`` segments in a
row have been above it. The average is of all steps of the segments from s on to that one; before there is a valley, of
those of the last segment. Floating buffers are averaged too.

This follows the paper's Algorithm 1. Its released code counts the first segment twice, and takes some before s that are
not above the threshold; like that code, and unlike the algorithm, this leaves out what is above it when the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lesam_dist.parallel.shards import local_shard
from lesam_dist.train.ema import WeightAverage


class ValleyAverage(WeightAverage):
    """As `WeightAverage`, but what it is is decided in evaluations: tell it of each. It keeps 2 + converge copies.

    Args:
        model: see `WeightAverage`.
        converge: segments of which the first must be the best, for a valley to begin with it.
        tolerance: segments in a row above the threshold that end it.
        tolerance_ratio: how far above the mean of the first losses the threshold lies.
    """

    decided_by_evaluation = True

    def __init__(self, model: nn.Module, converge: int, tolerance: int, tolerance_ratio: float) -> None:
        super().__init__(model, uniform_from=1)
        self._tolerance, self._ratio = tolerance, tolerance_ratio
        # `_averages` are of the segment that goes on. Of the last segments one copy each, until there is a valley;
        # then the first of these copies is the mean of the segments that may yet belong to it.
        self._chosen, *self._window = (
            {name: average.detach().clone() for name, average in self._averages.items()} for _ in range(1 + converge)
        )
        # Losses of the window; segments in it, in the valley, and after it so far; the threshold, nan without a valley.
        self._numbers = torch.full((converge + 4,), math.nan, dtype=torch.float64, device=self._updates.device)
        self._numbers[converge : converge + 3] = 0

    def _weight(self) -> Tensor:
        return 1 / (self._updates + 1)

    @torch.no_grad()
    def evaluated(self, loss: float) -> None:
        """The segment ends here, with this validation loss, which is the same on all processes."""
        size = len(self._window)
        *losses, kept, inside, after, threshold = self._numbers.tolist()
        self._updates.zero_()  # of a new segment
        if not math.isnan(threshold):
            if after < self._tolerance:
                _mix(self._window[0], self._averages, 1 / (after + 1))
                after += 1
                if loss <= threshold:
                    _mix(self._chosen, self._window[0], after / (inside + after))
                    inside, after = inside + after, 0
        else:
            if kept == size:  # the oldest makes room
                self._window.append(self._window.pop(0))
                losses = [*losses[1:], math.nan]
                kept -= 1
            _mix(self._window[int(kept)], self._averages, 1)
            losses[int(kept)] = loss
            kept += 1
            _mix(self._chosen, self._averages, 1)
            if kept == size and all(losses[0] <= other for other in losses):
                threshold = (1 + self._ratio) * sum(losses) / size
                inside, after = self._begin(losses, threshold)
        self._numbers.copy_(torch.tensor([*losses, kept, inside, after, threshold], dtype=torch.float64))

    def _begin(self, losses: list[float], threshold: float) -> tuple[int, int]:
        """The valley begins with the window's first segment; returns how many are inside, and after it so far."""
        inside = 1 + max(i for i, loss in enumerate(losses) if i == 0 or loss <= threshold)
        _mix(self._chosen, self._window[0], 1)
        for i in range(1, inside):
            _mix(self._chosen, self._window[i], 1 / (i + 1))
        for i in range(inside, len(losses)):
            _mix(self._window[0], self._window[i], 1 / (i - inside + 1))
        return inside, len(losses) - inside

    def buffers(self) -> dict[str, Tensor]:
        """The model's, of the average and of the segment that goes on; not copies."""
        own = super().buffers()
        return {name: self._chosen[name] for name in own} | {f"segment.{name}": own[name] for name in own}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        with self._swapped([local_shard(average) for average in self._chosen.values()]):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the model; what else it needs by names in front of these."""
        parts = {"segment": self._averages} | {f"window_{i}": copy for i, copy in enumerate(self._window)}
        others = {f"{part}.{name}": tensor for part, copy in parts.items() for name, tensor in copy.items()}
        return self._chosen | others | {"n_averaged": self._updates, "valley": self._numbers}


def _mix(into: dict[str, Tensor], other: dict[str, Tensor], weight: float) -> None:
    """``into <- (1 - weight) into + weight other``, in place; of sharded ones each process's part."""
    for name, average in into.items():
        if weight == 1:
            local_shard(average).copy_(local_shard(other[name]))
        else:
            local_shard(average).lerp_(local_shard(other[name]), weight)
