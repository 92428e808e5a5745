"""LARS and LAMB on whole layers in float64, written from their papers: see `lesam_dist.optim.bases`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class LARS64:
    """One group; layers of one dim or less are not adapted. Its defaults are the class's."""

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.weight_decay, self.trust_coefficient, self.eps = weight_decay, trust_coefficient, eps
        self.v: dict[int, Array] = {}

    def step(self, weights: list[Array], grads: list[Array | None]) -> None:
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            if g is None:
                continue
            ratio, w_norm, g_norm = 1.0, np.linalg.norm(w), np.linalg.norm(g)
            if w.ndim > 1 and w_norm > 0 and g_norm > 0:
                ratio = float(self.trust_coefficient * w_norm / (g_norm + self.weight_decay * w_norm + self.eps))
            d = ratio * (g + self.weight_decay * w)
            self.v[i] = self.momentum * self.v.get(i, np.zeros_like(w)) + d
            w -= self.lr * (d + self.momentum * self.v[i] if self.nesterov else self.v[i])

    def momenta(self, count: int) -> list[Array]:
        return [self.v[i] for i in range(count)]


class LAMB64:
    """One group; layers of one dim or less are not adapted. Its defaults are the class's."""

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m: dict[int, Array] = {}
        self.v: dict[int, Array] = {}
        self.t: dict[int, int] = {}

    def step(self, weights: list[Array], grads: list[Array | None]) -> None:
        b1, b2 = self.betas
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            if g is None:
                continue
            t = self.t[i] = self.t.get(i, 0) + 1
            m = self.m[i] = b1 * self.m.get(i, np.zeros_like(w)) + (1 - b1) * g
            v = self.v[i] = b2 * self.v.get(i, np.zeros_like(w)) + (1 - b2) * g**2
            u = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + self.eps) + self.weight_decay * w
            w_norm, u_norm = np.linalg.norm(w), np.linalg.norm(u)
            ratio = float(w_norm / u_norm) if w.ndim > 1 and w_norm > 0 and u_norm > 0 else 1.0
            w -= self.lr * ratio * u

    def momenta(self, count: int) -> list[Array]:
        return [self.m[i] for i in range(count)]
