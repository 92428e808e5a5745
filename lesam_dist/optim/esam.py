"""ESAM, Efficient SAM (Du et al., 2022, Algorithm 1; paper, section 2).

    M     = a random choice of tensors, each with probability beta                stochastic weight perturbation
    w_hat = w + rho / beta * g / ||g||  for those in M                            norm over M
    S     = the gamma * B samples whose loss rose most from w to w_hat            sharpness-sensitive data selection
    w     <- base step with g_hat = grad L_S(w_hat)                               from the exact w

The paper draws single coordinates, the released code whole tensors, as here. That code draws them from a generator
that differs between processes, and applies a draw one step late; here the draw is a function of ``seed`` and of the
step, the same on all processes, and applied at once. It keeps samples *above* the k-th rise, and so k - 1 of them; here
it is k, and at least one. Each process selects among its own samples.

Cost: a forward and backward pass, a forward pass (not with gamma = 1), and gamma of a forward and backward pass. With
gamma < 1 the closure is called with ``per_sample=True``, ``backward=False`` and ``subset``, see `BatchPasses`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative, PositiveShare
from lesam_dist.optim.engine.base import Closure
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.weights import Aim
from lesam_dist.optim.engine.wrapper import BaseOptimizer


class ESAM(
    FixedRadius,
    name="esam",
    along="g of some tensors; the second pass takes some samples",
    passes="1.8 (1, a forward, 0.5)",
):
    """ESAM around any torch optimizer: ``ESAM(params, torch.optim.SGD, rho=0.05, beta=0.6, gamma=0.5, lr=0.05)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0.
        beta: share of the tensors that is perturbed, in (0, 1].
        gamma: share of each process's samples that the second pass takes, in (0, 1].
        seed: of the choice of tensors; the same on all processes.
        kwargs: options of `SharpnessAware`, without ``ascent_interval``; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.05,
        beta: PositiveShare = 0.6,
        gamma: PositiveShare = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not 0 < value <= 1:
                raise ValueError(f"ESAM: {name} is {value}; it must be in (0, 1].")
        if kwargs.get("ascent_fraction", 1.0) != 1.0 and gamma < 1:
            raise ValueError("ESAM: gamma < 1 compares each sample's losses and needs ascent_fraction=1.")
        own = {"rho": rho, "esam_beta": beta, "esam_gamma": gamma, "esam_seed": seed}
        super().__init__(params, base_optimizer, own, counts_steps=True, **kwargs)

    def radius(self, group: dict[str, Any]) -> Radius:
        return Radius(sigma=math.inf, rho_max=float(group["rho"]) / self._option("beta"), eps=0.0)

    def aim(self, grads: list[Gradients]) -> Aim:
        beta = self._option("beta")
        if beta == 1:
            return Aim(grads)
        params = [p for group in self.param_groups for p in group["params"]]
        generator = torch.Generator().manual_seed(int(self._option("seed")) + 1_000_003 * self.step_index)
        drawn = dict(zip(params, (torch.rand(len(params), generator=generator) < beta).tolist(), strict=True))
        return Aim(
            [
                [g if drawn[p] else None for p, g in zip(rows.params, row_grads, strict=True)]
                for rows, row_grads in zip(self._perturbation.rows, grads, strict=True)
            ]
        )

    def first_pass(self, closure: Closure, **arguments: Any) -> Any:
        if self._option("gamma") == 1:
            return self.run_pass(closure, **arguments)
        self._clean_losses: Tensor = self.run_pass(closure, per_sample=True, **arguments)
        return self._clean_losses.mean()

    def second_pass(self, closure: Closure) -> Any:
        gamma = self._option("gamma")
        if gamma == 1:
            return self.run_pass(closure)
        rise = self.run_pass(closure, per_sample=True, backward=False) - self._clean_losses
        if self.param_groups[0].get("maximize"):
            rise = -rise
        count = max(1, int(gamma * len(rise)))
        return self.run_pass(closure, subset=rise.topk(count).indices)

    def owns_passes(self) -> str | None:
        gamma = self._option("gamma")
        return super().owns_passes() or (f"the second pass takes {gamma} of the samples" if gamma < 1 else None)

    def _option(self, name: str) -> float:
        return float(self.param_groups[0][f"esam_{name}"])
