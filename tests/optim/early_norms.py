"""Nets whose norms are taken during backward, beside equal ones without, and who takes how many sums."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

from lesam_dist.optim.engine import early_sums
from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.train.passes import BatchPasses
from tests.optim.nets import DEVICE

BACKENDS = ("reference", "triton")
LAYERS = 3  # each a group


class Launches:
    """Counts the sums that are taken, by where: in backward, in the step for a group, in the step for everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backward = self.groups = self.whole = 0
        self._inside = False
        for ops in ops_classes():
            for name in ("sum_sq_first", "sum_sq_second"):
                monkeypatch.setattr(ops, name, self._counted(getattr(ops, name)))
        sum_up = early_sums._Group.sum_up

        def sum_of_group(group: Any) -> None:
            self._inside = True
            sum_up(group)
            self._inside = False

        monkeypatch.setattr(early_sums._Group, "sum_up", sum_of_group)

    def _counted(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(ops: Any, *args: Any) -> Tensor:
            if self._inside and torch._C._current_graph_task_id() >= 0:
                self.backward += 1
            elif self._inside:
                self.groups += 1
            elif len(args) < 4 or args[3] is None:
                self.whole += 1
            return method(ops, *args)

        return counted

    def take(self) -> tuple[int, int, int]:
        """Since the last call."""
        counts = self.backward, self.groups, self.whole
        self.backward = self.groups = self.whole = 0
        return counts


def ops_classes() -> list[type]:
    from lesam_dist.optim.engine.reference_backend import ReferenceOps
    from lesam_dist.optim.engine.triton_backend import TritonOps

    return [ReferenceOps, TritonOps]


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = [nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 7, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x, torch.randint(3, (12,), generator=generator).to(DEVICE)


def closure_of(net: nn.Module, seed: int, scaler: GradScaler | None = None) -> BatchPasses:
    x, y = batch(seed, next(net.parameters()).dtype)
    return BatchPasses(net, nn.CrossEntropyLoss(), x, y, scaler=scaler)


def pair(
    seed: int, method: Any, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> list[tuple[nn.Sequential, SharpnessAware]]:
    """Two equal nets, the first with a plain optimizer, the second with norms in backward."""
    torch.manual_seed(seed)
    net = make_net(dtype)
    nets = [net, copy.deepcopy(net)]
    build = [
        method(each.parameters(), SGD, lr=0.1, momentum=0.9, norm_in_backward=early, **kwargs)
        for each, early in zip(nets, (False, True), strict=True)
    ]
    return list(zip(nets, build, strict=True))


def assert_close(pair: list[tuple[nn.Sequential, SharpnessAware]]) -> None:
    """Weights and telemetry but for the order in which sums were added up."""
    (first, plain), (second, early) = pair
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-12 * p.abs().max()
    for name, value in plain.telemetry.items():
        torch.testing.assert_close(early.telemetry[name].double(), value.double(), rtol=1e-12, atol=0.0)


def unused(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    """A closure that gives the last layer no gradient in every second step."""
    x, _ = batch(seed, next(net.parameters()).dtype)

    def closure() -> Tensor:
        loss = net[: 2 if seed % 2 else 5](x).square().mean()
        loss.backward()
        return loss  # type: ignore[no-any-return]

    return closure


def accumulated(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    """A closure of two backward passes, the second of them for the first layers alone."""
    x, y = batch(seed, next(net.parameters()).dtype)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        other = net[:3](x).square().mean()
        other.backward()
        return loss + other.detach()

    return closure
