"""Losses of linear models, of which everything is known in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.parallel.processes import Distributed

F64 = torch.float64


def squared(out: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((out[:, 0] - targets) ** 2).sum()


def plain_sum(out: Tensor, _: Tensor) -> Tensor:
    """A loss that is linear in the weights of a linear model."""
    return out.sum()


class Quadratic(NamedTuple):
    """``L(w + d) = L(w) + g'd + d'Ad / 2`` of some images, at the weights w that the model has."""

    matrix: Tensor
    gradient: Tensor

    def rise(self, d: Tensor) -> float:
        return float(self.gradient @ d + d @ self.matrix @ d / 2)

    def noise_variance(self, scale: Tensor) -> float:
        """Of a draw of the rise at d = scale * n, n ~ N(0, I): |S g|^2 + tr((S A S)^2) / 2."""
        scaled = scale[:, None] * self.matrix * scale
        return float((scale * self.gradient).square().sum() + scaled.square().sum() / 2)

    def noise_mean(self, scale: Tensor) -> float:
        """tr(S A S) / 2."""
        return float((scale.square() * self.matrix.diagonal()).sum() / 2)


def regression(n: int, d: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model, images (n, d) and targets (n,)."""
    return nn.Linear(d, 1, bias=False).double(), torch.randn(n, d, dtype=F64), torch.randn(n, dtype=F64)


def quadratic_of(model: nn.Module, x: Tensor, y: Tensor) -> Quadratic:
    """From the images, without autograd."""
    w = next(model.parameters()).detach()[0]
    return Quadratic(x.T @ x / len(x), x.T @ (x @ w - y) / len(x))


def in_batches(x: Tensor, y: Tensor, size: int) -> list[Batch]:
    return list(zip(x.split(size), y.split(size), strict=True))


def shared(model: nn.Module, x: Tensor, y: Tensor, world: Distributed) -> Objective:
    """This process's contiguous part of the images in batches of 7, as evaluation has them."""
    n, rank, count = len(x), world.rank, world.world_size
    own = slice(rank * n // count, (rank + 1) * n // count)
    return Objective(model, in_batches(x[own], y[own], 7), world, criterion=squared)
