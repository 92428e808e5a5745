"""`descends` tells a closure whether its gradient is the update's: the last of a step, of every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import optim
from lesam_dist.optim.plain import Plain
from lesam_dist.train.passes import BatchPasses
from tests.methods import CASES
from tests.optim.test_two_step import MORE

EVERY = {name: (case.method, case.kwargs) for name, case in CASES.items()} | MORE | {"plain": (Plain, {})}


class Told(BatchPasses):
    """Notes what it is told in each pass that makes a gradient."""

    optimizer: optim.SharpnessAware
    told: list[bool]

    def __call__(self, **kwargs: Any) -> Tensor:
        if kwargs.get("backward", True):
            self.told.append(self.optimizer.descends)
        return super().__call__(**kwargs)


@pytest.mark.parametrize("closures", [1, 2])
@pytest.mark.parametrize("name", EVERY)
def test_only_the_last_gradient_of_a_closure_is_the_updates(seed: int, name: str, closures: int) -> None:
    method, kwargs = EVERY[name]
    net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer: Any = method(net.parameters(), SGD, lr=0.1, momentum=0.9, **kwargs)
    numbers = set()
    for _ in range(4):
        parts = [Told(net, nn.CrossEntropyLoss(), torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(closures)]
        for part in parts:
            part.told, part.optimizer = [], optimizer
        optimizer.step(parts if closures > 1 else parts[0])
        for part in parts:
            assert part.told == [False] * (len(part.told) - 1) + [True]
            numbers.add(len(part.told))
    assert (numbers == {1}) == (name in ("plain", "msam", "s2sam"))
