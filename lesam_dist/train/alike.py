"""What must be equal between the passes of one step: the random numbers, and BatchNorm's running statistics.

Only the first pass may move the statistics, since later ones see perturbed weights; and dropout or stochastic depth
that differed would make of the second pass another function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lesam_dist.optim.engine import capturing
from lesam_dist.train.batchnorm import frozen_batchnorm


class Alike:
    """Makes the passes of one step alike: put each of them into ``with alike():``, from one object a step.

    In a CUDA graph the device's random numbers cannot be put back, so the passes of a step then draw different ones.

    Args:
        model: whose BatchNorm layers stand still from the second pass on.
        device: that the model computes on; its random numbers are put back beside the CPU's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self._rng: list[Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around one pass: the first is as it is, each further one begins with the random numbers of the first."""
        if self._rng is None:
            self._rng = _rng_state(self.device)
            yield
            return
        _set_rng_state(self._rng, self.device)
        with frozen_batchnorm(self.model):
            yield


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda" and not capturing.is_capturing(device):
        states.append(torch.cuda.get_rng_state(device))  # kept on the host: no sync
    return states


def _set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
