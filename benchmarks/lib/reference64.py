"""A float64 step, which says whether what a provider does is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib.problem import Problem, norm64, set_grads
from lib.providers import Provider
from lib.traffic import Base

# Largest error of a tensor, in units of the largest element that it is or was made of: a few roundings of the dtype
# (eps 1.2e-7 and 7.8e-3). A weight that an update all but cancels, or a gradient that weight decay does, keeps the
# roundings of both.
# Perturbed weights get more room in float32, because torch's own norm of a large tensor is off by 1e-4 on the CPU. The
# perturbation is a tenth of the weights, so that a wrong radius shows all the same, in bfloat16 too.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}
TOLERANCE_PERTURBED = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Expected:
    """What a step leaves behind, in float64: after the ascent, and after the descent."""

    perturbed: list[Tensor]
    weights: list[Tensor]
    moments: list[list[Tensor]]


def expected_steps(problem: Problem, base: Base) -> list[Expected]:
    """Two steps of the paper's Algorithm 1 around SGD with momentum or AdamW, in float64 and in its textbook form."""
    h = problem.hyper
    first, second = ([g.double() for g in grads] for grads in (problem.first, problem.second))
    norm = float(norm64(first))
    rho = min(h.sigma / (norm + h.eps), h.rho_max)
    weights = [w.double() for w in problem.weights]
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(1 if base == "sgd" else 2)]
    steps = []
    for t in (1, 2):
        perturbed = [torch.add(w, g, alpha=rho / norm) for w, g in zip(weights, first, strict=True)]
        if base == "sgd":
            momenta = [
                h.momentum * m + g + h.weight_decay * w for m, g, w in zip(moments[0], second, weights, strict=True)
            ]
            weights = [w - h.lr * m for w, m in zip(weights, momenta, strict=True)]
            moments = [momenta]
        else:
            (b1, b2), (ms, vs) = h.betas, moments
            ms = [b1 * m + (1 - b1) * g for m, g in zip(ms, second, strict=True)]
            vs = [b2 * v + (1 - b2) * g * g for v, g in zip(vs, second, strict=True)]
            weights = [
                w - h.lr * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + h.adam_eps) + h.weight_decay * w)
                for w, m, v in zip(weights, ms, vs, strict=True)
            ]
            moments = [ms, vs]
        steps.append(Expected(perturbed, weights, moments))
    return steps


def wrong(provider: type[Provider], problem: Problem, base: Base, expected: list[Expected]) -> str | None:
    """What a provider gets wrong in two whole steps, or None: perturbed weights, weights and momentum."""
    first, second = ([g.clone() for g in grads] for grads in (problem.first, problem.second))
    mine = provider(problem.parameters(), base, problem.hyper, problem.rho)
    dtype = problem.weights[0].dtype
    before = [w.double() for w in problem.weights]
    gradients = [g.double() for g in problem.second]
    zeros = [torch.zeros_like(w) for w in before]
    moments_before = [zeros] * len(expected[0].moments)
    for t, step in enumerate(expected, 1):
        set_grads(mine.params, first)
        mine.ascent()
        climb = [torch.maximum(w.abs(), (p - w).abs()) for p, w in zip(step.perturbed, before, strict=True)]
        error = _error(mine.params, step.perturbed, climb)
        if not error <= TOLERANCE_PERTURBED[dtype]:
            return f"wrong perturbed weights in step {t}: off by {error:.1e} of the largest element"
        set_grads(mine.params, second)
        mine.descent()
        checks = [("weights", mine.params, step.weights, before)]
        made_of = [[torch.maximum(m.abs(), g.abs()) for m, g in zip(moments_before[0], gradients, strict=True)]]
        momenta = zip(mine.state(), step.moments, made_of + moments_before[1:], strict=True)
        checks += [("momentum", values, right, earlier) for values, right, earlier in momenta]
        for what, values, right, earlier in checks:
            error = _error(values, right, earlier)
            if not error <= TOLERANCE[dtype]:
                return f"wrong {what} after step {t}: off by {error:.1e} of the largest element"
        before, moments_before = step.weights, step.moments
    return None


def _error(values: list[Tensor], expected: list[Tensor], made_of: list[Tensor]) -> float:
    """Largest difference of a tensor over the largest element of it and what it was made of; the worst tensor's."""
    errors = [
        (value.detach().double() - e).abs().max() / torch.maximum(e.abs().max(), m.abs().max()).clamp(min=1e-30)
        for value, e, m in zip(values, expected, made_of, strict=True)
    ]
    return float(torch.stack(errors).max())
