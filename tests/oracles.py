"""Independent float64 implementations that the tests compare with. They import nothing of lesam_dist."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float64]]


def largest(w: Weights) -> float:
    """max |w_i| over all tensors: what an absolute tolerance refers to, as one tensor alone may be nearly zero."""
    return max(float(np.abs(value).max()) for value in w.values())


class SGD64:
    """Heavy-ball SGD with L2 weight decay, as torch documents it."""

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> None:
        self.lr, self.momentum, self.weight_decay, self.nesterov = lr, momentum, weight_decay, nesterov
        self.buffer: Weights = {}

    def __call__(self, w: Weights, g: Weights) -> None:
        for name in g:
            d = g[name] + self.weight_decay * w[name]
            if self.momentum:
                self.buffer[name] = self.momentum * self.buffer[name] + d if name in self.buffer else d.copy()
                d = d + self.momentum * self.buffer[name] if self.nesterov else self.buffer[name]
            w[name] = w[name] - self.lr * d


class AdamW64:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, Algorithm 2)."""

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m: Weights = {}
        self.v: Weights = {}
        self.t = 0

    def __call__(self, w: Weights, g: Weights) -> None:
        self.t += 1
        b1, b2 = self.betas
        for name in g:
            self.m[name] = b1 * self.m.get(name, 0.0) + (1 - b1) * g[name]
            self.v[name] = b2 * self.v.get(name, 0.0) + (1 - b2) * g[name] ** 2
            m_hat = self.m[name] / (1 - b1**self.t)
            v_hat = self.v[name] / (1 - b2**self.t)
            decayed = w[name] * (1 - self.lr * self.weight_decay)
            w[name] = decayed - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


def algorithm_1(
    w: Weights,
    gradient: Callable[[Weights, int], Weights],
    base: Callable[[Weights, Weights], None],
    *,
    steps: int,
    sigma: Callable[[int], float],
    rho_max: float = np.inf,
    eps: float = 1e-12,
    alpha: float = 0.0,
    released: bool = False,
    first_gradient: Callable[[Weights, int], Weights] | None = None,
    interval: int = 1,
    reuse: bool = False,
    max_norm: float = np.inf,
) -> tuple[Weights, list[float]]:
    """LE-SAM line by line (paper, Algorithm 1; Eq. 16 for alpha). Returns the weights and the radii.

    ``first_gradient`` replaces g. With ``interval`` k, g is taken at every k-th step; between, it is the last one
    (``reuse``) or there is no perturbation. ``max_norm`` clips g_hat as torch's clip_grad_norm_ does.
    """
    w = {name: value.copy() for name, value in w.items()}
    radii = []
    g: Weights = {}
    for t in range(steps):
        if t % interval == 0:
            g = (first_gradient or gradient)(w, t)
        norm = norm_of(g)
        rho = min(sigma(t) / (norm + eps), rho_max) if t % interval == 0 or reuse else 0.0
        radii.append(rho)
        perturbed = {name: w[name] + (rho * g[name] / norm if norm > 0 else 0.0) for name in w}
        g_hat = gradient(perturbed, t)
        clip = min(1.0, max_norm / (norm_of(g_hat) + 1e-6))
        a, b = (1.0 if released else 1.0 + alpha, -alpha) if t % interval == 0 else (1.0, 0.0)
        base(w, {name: a * clip * g_hat[name] + b * g[name] for name in g})
    return w, radii


def m_sharpness(
    w: Weights,
    gradient: Callable[[Weights, int, int], Weights],
    base: Callable[[Weights, Weights], None],
    *,
    steps: int,
    parts: int,
    sigma: float,
    alpha: float = 0.0,
) -> Weights:
    """One perturbation for each part of a batch, one step with the mean of the gradients (Foret et al., 4.1)."""
    w = {name: value.copy() for name, value in w.items()}
    for t in range(steps):
        mean = {name: np.zeros_like(value) for name, value in w.items()}
        for part in range(parts):
            g = gradient(w, t, part)
            perturbed = {name: w[name] + sigma * g[name] / norm_of(g) ** 2 for name in w}
            g_hat = gradient(perturbed, t, part)
            for name in mean:
                mean[name] += ((1 + alpha) * g_hat[name] - alpha * g[name]) / parts
        base(w, mean)
    return w


def norm_of(g: Weights) -> float:
    """The global L2 norm."""
    return float(np.sqrt(sum(float((value**2).sum()) for value in g.values())))
