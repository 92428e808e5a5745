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

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative, PositiveShare
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.rule import Closure
from lesam_dist.optim.engine.vectors import Vector
from lesam_dist.optim.sam import SAM


class ESAM(
    SAM,
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

    group_names: ClassVar = {"beta": "esam_beta", "gamma": "esam_gamma", "seed": "esam_seed"}
    counts_steps = True

    _clean_losses: Tensor  # of each sample, from the first pass of a step

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
        if kwargs.get("ascent_fraction", 1.0) != 1.0 and gamma < 1:
            raise ValueError("ESAM: gamma < 1 compares each sample's losses and needs ascent_fraction=1.")
        super().__init__(params, base_optimizer, rho=rho, beta=beta, gamma=gamma, seed=seed, **kwargs)

    def radius(self, group: dict[str, Any]) -> Radius:
        return Radius.fixed(float(group["rho"]) / self.first("beta"))

    def climb(self, g: Vector) -> Vector:
        beta = self.first("beta")
        if beta == 1:
            return g
        count = sum(len(group["params"]) for group in self.param_groups)
        generator = torch.Generator().manual_seed(int(self.first("seed")) + 1_000_003 * self.step_index)
        return g.only((torch.rand(count, generator=generator) < beta).tolist())

    def first_pass(self, closure: Closure, **arguments: Any) -> Any:
        if self.first("gamma") == 1:
            return self.run_pass(closure, **arguments)
        self._clean_losses = self.run_pass(closure, per_sample=True, **arguments)
        return self._clean_losses.mean()

    def second_pass(self, closure: Closure) -> Any:
        gamma = self.first("gamma")
        if gamma == 1:
            return self.run_pass(closure)
        rise = self.run_pass(closure, per_sample=True, backward=False) - self._clean_losses
        if self.param_groups[0].get("maximize"):
            rise = -rise
        count = max(1, int(gamma * len(rise)))
        return self.run_pass(closure, subset=rise.topk(count).indices)

    def owns_passes(self) -> str | None:
        gamma = self.first("gamma")
        return super().owns_passes() or (f"the second pass takes {gamma} of the samples" if gamma < 1 else None)
