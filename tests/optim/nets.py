"""A small net, a closure on a fixed batch, and whether weights are the same bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).to(DEVICE)


def make_closure(net: nn.Module, scale: Callable[[int], float] = lambda call: 1.0) -> Callable[[], Tensor]:
    """A fixed batch; the loss of the n-th call (from 0) is multiplied by ``scale(n)``.

    It is drawn on the CPU, whose generator is the one that `torch.set_rng_state` sets.
    """
    x, y = torch.randn(8, 5).to(DEVICE), torch.randint(0, 3, (8,)).to(DEVICE)
    calls = iter(range(1000))

    def run() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y) * scale(next(calls))
        loss.backward()
        return loss

    return run


def snapshot(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(net: nn.Module, weights: list[Tensor]) -> bool:
    return all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
