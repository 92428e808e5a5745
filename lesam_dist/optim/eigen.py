"""Eigen-SAM (Luo et al., 2024, Algorithm 1; paper, section 2).

    v     ~ the Hessian's eigenvector of largest eigenvalue in size, by power iteration every k steps
    d     = g/||g|| + alpha * sign(g . v) * (v - (g/||g|| . v) g/||g||)
    w_hat = w + rho * d                                  d is not normalised again
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

That is the released code. The paper of LE-SAM writes ``w + rho * v`` for it (Eq. 18), which the code does not do.
Until the first v, at step k, it is SAM. Products with the Hessian are differences of gradients, reduced like any other,
``H v ~ (grad L(w + r v) - grad L(w - r v)) / 2r``, where the released code differentiates twice, which DDP and FSDP2
cannot. The iteration starts from the last v, at first from the gradient (there: from noise), on the step's own batch.
Two more differences: the Hessian is that of training (there: of the model in eval mode, where BatchNorm normalises by
its running statistics), and k counts all steps (there: those of an epoch, so that short epochs never make a v).

Cost: two forward and backward passes a step, and 2 * power_steps more every k steps; v, one tensor per parameter, is in
the `state_dict`. Each is a call of the closure with perturbed weights, between the two that every method makes: let all
calls but a step's first leave BatchNorm's running statistics alone, as `BatchPasses` does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import Count, NonNegative, Positive
from lesam_dist.optim.engine.base import Closure
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.options import require_nonnegative
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.weights import Aim
from lesam_dist.optim.engine.wrapper import BaseOptimizer

_VECTOR = "eigenvector"


class EigenSAM(
    FixedRadius,
    name="eigensam",
    along="g and the Hessian's first eigenvector",
    passes="2, and 10 more every 100 steps",
    keeps="the vector",
):
    """Eigen-SAM around any torch optimizer: ``EigenSAM(params, torch.optim.SGD, rho=0.05, alpha=0.2, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius along the gradient, >= 0.
        alpha: weight of the eigenvector, >= 0; 0 is SAM. In the groups it is ``eigen_alpha``.
        interval: k, steps from one power iteration to the next, >= 1.
        power_steps: products with the Hessian in each of them, >= 1.
        probe: r, the length of the step of a difference, > 0.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    memory_names = (_VECTOR,)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.05,
        alpha: NonNegative = 0.2,
        interval: Count = 100,
        power_steps: Count = 5,
        probe: Positive = 1e-2,
        **kwargs: Any,
    ) -> None:
        if interval < 1 or power_steps < 1 or not probe > 0:
            raise ValueError(
                f"EigenSAM: interval {interval} and power_steps {power_steps} must be >= 1, and probe {probe} > 0."
            )
        own = {"rho": rho, "eigen_alpha": alpha, "eigen_interval": interval, "power_steps": power_steps, "probe": probe}
        super().__init__(params, base_optimizer, own, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        require_nonnegative("EigenSAM", "alpha", group["eigen_alpha"])

    def first_pass(self, closure: Closure, **arguments: Any) -> Any:
        loss = self.run_pass(closure, **arguments)
        group = self.param_groups[0]
        if group["eigen_alpha"] and self.step_index > 0 and self.step_index % group["eigen_interval"] == 0:
            self._iterate(closure)
        return loss

    def owns_passes(self) -> str | None:
        group = self.param_groups[0]
        probes = f"one step in {group['eigen_interval']} makes {2 * group['power_steps']} more passes"
        return super().owns_passes() or (probes if group["eigen_alpha"] else None)

    def aim(self, grads: list[Gradients]) -> Aim:
        weights = self._perturbation
        grads = weights.of_perturbed(grads)
        alpha = float(self.param_groups[0]["eigen_alpha"])
        if not alpha or self.step_index < self.param_groups[0]["eigen_interval"]:
            return Aim(grads)
        vectors = [self._memory.read_or_zero(_VECTOR, rows, g) for rows, g in zip(weights.rows, grads, strict=True)]
        norm = weights.dot(grads, grads).sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        along = weights.dot(grads, vectors) * inverse  # of the eigenvector on g/||g||
        a = inverse * (1 - alpha * along.abs())
        b = alpha * along.sign()
        directions: list[Gradients] = []
        for row_grads, values in zip(grads, vectors, strict=True):
            pairs = zip(row_grads, values, strict=True)
            directions.append([None if g is None or v is None else g * a.to(g) + v * b.to(g) for g, v in pairs])
        # Its length is part of the method, so it counts as 1; a norm that is not finite makes this so too.
        return Aim(directions, sum_sq=torch.where(norm > 0, 1.0 + 0.0 * norm, norm))

    def _iterate(self, closure: Closure) -> None:
        """Power iteration from the last eigenvector, around the exact weights; leaves the first pass's gradients."""
        weights = self._perturbation
        first = [[None if g is None else g.clone() for g in row_grads] for row_grads in self.first_gradients()]
        group = self.param_groups[0]
        vector = [self._memory.read(_VECTOR, rows) for rows in weights.rows]
        if self.step_index == group["eigen_interval"]:
            vector = weights.of_perturbed(first)
        vector = self._unit(vector)
        for _ in range(int(group["power_steps"])):
            forward, backward = (self._gradient_at(closure, vector, sign * group["probe"]) for sign in (1, -1))
            product: list[Gradients] = [
                [None if f is None or b is None else f - b for f, b in zip(fs, bs, strict=True)]
                for fs, bs in zip(forward, backward, strict=True)
            ]
            vector = self._unit(weights.of_perturbed(product))
        usable = torch.isfinite(weights.dot(vector, vector))
        for rows, values in zip(weights.rows, vector, strict=True):
            pairs = zip(values, self._memory.read(_VECTOR, rows), strict=True)
            new = [
                None if v is None else torch.where(usable.to(v.device), v, 0.0 if old is None else old)
                for v, old in pairs
            ]
            self._memory.replace(_VECTOR, rows, new)
        for row_grads, saved in zip(weights.gradients(), first, strict=True):
            for g, value in zip(row_grads, saved, strict=True):
                if g is not None and value is not None:
                    g.copy_(value)

    def _gradient_at(self, closure: Closure, vector: list[Gradients], length: float) -> list[Gradients]:
        weights = self._perturbation
        signed = [[None if v is None else math.copysign(1.0, length) * v for v in values] for values in vector]
        one = torch.ones((), dtype=torch.float64, device=self.overflow.device)
        weights.perturb(Aim(signed, sum_sq=one), [Radius(math.inf, abs(length), 0.0)] * len(self.param_groups))
        self.zero_grads()
        self.run_pass(closure)
        weights.restore()
        return [[None if g is None else g.clone() for g in row_grads] for row_grads in weights.gradients()]

    def _unit(self, vector: list[Gradients]) -> list[Gradients]:
        norm = self._perturbation.dot(vector, vector).sqrt()
        inverse: Tensor = torch.where(norm > 0, 1 / norm, 0.0)
        return [[None if v is None else v * inverse.to(v) for v in values] for values in vector]
