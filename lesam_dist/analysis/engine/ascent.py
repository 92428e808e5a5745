"""How far the loss rises within a distance of the weights: by one step, as SAM climbs, and by Auto-PGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.randomness import normal

Norm = str
"""l2 or linf."""


def one_step(objective: Objective, rhos: Sequence[float], *, adaptive: bool = False) -> list[float]:
    """``L(w + d) - L(w)`` after one step of ascent, for each rho: the sharpness that SAM and ASAM see.

    SAM (Foret et al. 2021): ``d = rho g / ||g||``. ASAM (Kwon et al. 2021) with T_w = diag |w| and without its eta:
    ``d = rho T_w^2 g / ||T_w g||``. No step where g, or T_w g, is zero. One forward and backward, and a forward for
    each rho.
    """
    loss, gradient = objective.gradient()
    weights = objective.weights()
    scale = _scale(weights, adaptive)
    along = scale * _steepest(scale * gradient, "l2")
    return [_loss_at(objective, weights + rho * along) - loss for rho in rhos]


def auto_pgd(
    objective: Objective,
    rho: float,
    *,
    norm: Norm = "l2",
    adaptive: bool = False,
    steps: int = 20,
    momentum: float = 0.75,
) -> float:
    """The largest ``L(w + d) - L(w)`` that Auto-PGD finds with ``||d||_2 <= rho`` or ``max |d_i| <= rho``; at least 0.

    Adaptive: with ``||d / |w| ||_2 <= rho`` or ``|d_i| <= rho |w_i|``; weights of zero stay. The measure is that of
    Andriushchenko et al., "A modern look at the relationship between sharpness and generalization" (2023), the ascent
    is Algorithm 1 of Croce and Hein (2020) in weight space:

        u in the unit ball times rho, d = s u, s = |w| or 1
        z(k+1) = P(u(k) + step * steepest(s * grad L(w + s u(k))))
        u(k+1) = P(u(k) + 0.75 (z(k+1) - u(k)) + 0.25 (u(k) - u(k-1)))

    with a step of 2 rho, halved at checkpoints, with a return to the best point, where fewer than 3/4 of the steps
    since the last checkpoint raised the loss, or where neither step nor best changed since. The first step has no
    momentum, so that in the l2 ball it is SAM's: the result is never below that of `one_step`. The start is w, or with
    a gradient of zero the direction of fixed noise from there; the authors' code starts at a random point, which in l2
    is far outside of the ball for a large network, and moves in the adaptive l2 ball along |w| g. It is a lower bound
    of the true maximum.

    Steps forwards, and as many backwards less one, and one of each for g.
    """
    clean, gradient = objective.gradient()
    weights = objective.weights()
    scale = _scale(weights, adaptive)
    if not (scale * gradient).any():
        gradient = normal(objective.size, weights, 0, "auto_pgd")
    within = _projection(rho, norm)
    u = previous = torch.zeros_like(weights)
    loss = best = best_before = clean
    best_u, best_gradient = u, gradient
    step, since, raised, halved = 2 * rho, 0, 0, False
    ends = checkpoints(steps)
    for k in range(1, steps + 1):
        z = within(u + step * _steepest(scale * gradient, norm))
        share = momentum if k > 1 else 1.0
        u, previous = within(u + share * (z - u) + (1 - share) * (u - previous)), u
        before = loss
        with objective.at(weights + scale * u):
            loss, gradient = objective.gradient() if k < steps else (objective.loss(), gradient)
        raised += loss > before
        if loss > best:
            best, best_u, best_gradient = loss, u, gradient
        if k in ends:
            halved = raised < 0.75 * (k - since) or (not halved and best == best_before)
            since, raised, best_before = k, 0, best
            if halved:
                step, loss, u, gradient = step / 2, best, best_u, best_gradient
    return best - clean


def average_rise(
    objective: Objective, stds: Sequence[float], *, draws: int, seed: int, first: int = 0, adaptive: bool = False
) -> list[float]:
    """The mean over draws of ``L(w + d) - L(w)``, for each rho of ``d ~ N(0, rho^2 I)``; adaptive: N(0, rho^2 w^2).

    To second order ``rho^2 tr(H) / 2``. The same noise for all rhos. A forward for L(w), and one for each.

    Args:
        objective: the loss.
        stds: each rho, a standard deviation.
        draws: of the noise, numbers ``first`` to ``first + draws - 1`` of those of ``seed``.
        seed: of the noise.
        first: as above.
        adaptive: in units of each weight.
    """
    loss = objective.loss()
    weights = objective.weights()
    scale = _scale(weights, adaptive)
    sums = [0.0] * len(stds)
    for i in range(first, first + draws):
        noise = scale * normal(objective.size, weights, seed, "average", i)
        for j, std in enumerate(stds):
            sums[j] += _loss_at(objective, weights + std * noise) - loss
    return [total / draws for total in sums]


def checkpoints(steps: int) -> set[int]:
    """After which of the steps Auto-PGD asks whether to halve its step: 0.22 of them, and ever shorter periods."""
    before, point, found = 0, 22, set()  # in percent: as fractions, 0.7 * 20 would be above 14
    while point <= 100:
        found.add(-(-point * steps // 100))
        before, point = point, point + max(point - before - 3, 6)
    return found


def _loss_at(objective: Objective, weights: Tensor) -> float:
    with objective.at(weights):
        return objective.loss()


def _scale(weights: Tensor, adaptive: bool) -> Tensor:
    return weights.abs() if adaptive else torch.ones_like(weights)


def _steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Of unit length in the norm, where the inner product with the gradient is largest; zero for zero."""
    if norm == "linf":
        return gradient.sign()
    length = gradient.norm()
    return gradient / length if length > 0 else torch.zeros_like(gradient)


def _projection(rho: float, norm: Norm) -> Callable[[Tensor], Tensor]:
    if norm == "linf":
        return lambda u: u.clamp(-rho, rho)
    return lambda u: u * (rho / u.norm().clamp(min=rho))
