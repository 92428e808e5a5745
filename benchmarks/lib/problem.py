"""The problem that providers are timed on: weights, two gradients, and the settings of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.shapes import Shape
from lib.traffic import Base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Hyper:
    """LE-SAM's radius, ``min(sigma / (norm + eps), rho_max)``, and the base optimizer's settings.

    An infinite ``sigma`` makes it SAM with the radius ``rho_max``.
    """

    sigma: float
    rho_max: float
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    eps: float = 1e-12
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8

    def scale(self, norm: Tensor) -> Tensor:
        """What the gradient is multiplied with, 0-d on the device: no host sync."""
        return torch.clamp(self.sigma / (norm + self.eps), max=self.rho_max) / norm

    def base_kwargs(self, base: Base) -> dict[str, Any]:
        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        if base == "sgd":
            return {**shared, "momentum": self.momentum}
        return {**shared, "betas": self.betas, "eps": self.adam_eps}


@dataclass(frozen=True)
class Problem:
    """Weights, two gradients, and settings. ``rho`` is the radius that the settings give for ``first``."""

    weights: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    hyper: Hyper
    rho: float

    def parameters(self) -> list[Tensor]:
        """Fresh leaves with the weights' values."""
        return [torch.nn.Parameter(w.clone()) for w in self.weights]


def make_problem(shapes: list[Shape], dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """Random weights and gradients of plausible sizes; the budget sigma gives a tenth of the weights as radius."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    weights = [normal(shape, math.prod(shape[1:]) ** -0.5) for shape in shapes]
    first, second = ([normal(shape, 1e-3) for shape in shapes] for _ in range(2))
    rho = 0.1 * float(norm64(weights))
    hyper = Hyper(sigma=rho * float(norm64(first)), rho_max=10 * rho)
    return Problem(weights, first, second, hyper, rho)


def norm64(tensors: list[Tensor]) -> Tensor:
    """Global 2-norm in float64, 0-d."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()


def set_grads(params: list[Tensor], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
