"""GSAM, Surrogate Gap Guided SAM (Zhuang et al., 2022, Algorithm 1; paper, section 2).

    rho_t = rho_min + (rho - rho_min) * (lr - lr_min) / (lr_max - lr_min)
    w_hat = w + rho_t * g / ||g||                        one norm over all perturbed parameters
    g_v   = g - (g . g_hat) / ||g_hat||^2 * g_hat        the part of g that does not change the perturbed loss
    w     <- base step with g_hat - alpha * g_v          from the exact w

Exact: the formulas above, which are the paper's and the released torch code's. That one decomposes each process's own
gradients and averages the result; here the averaged gradients are decomposed, so that the numbers do not depend on the
number of processes. alpha = 0 is SAM. Cost: two forward and backward passes a step, one copy of g, and three inner
products.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.vectors import Vector, ratio
from lesam_dist.optim.sam import SAM


class GSAM(SAM, name="gsam", along="g; removes from it what does not change the perturbed loss", keeps="g"):
    """GSAM around any torch optimizer: ``GSAM(params, torch.optim.SGD, rho=0.05, alpha=0.4, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0; the largest one where it follows the learning rate.
        alpha: weight of g_v, >= 0. In the groups it is ``gsam_alpha``; the first group's holds for all.
        rho_min: with it the radius follows the learning rate of its group, from ``rho`` at ``lr_max`` to ``rho_min`` at
            ``lr_min``; None keeps it at ``rho``.
        lr_max: the peak learning rate; None takes ``lr``.
        lr_min: the lowest one.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    group_names: ClassVar = {"alpha": "gsam_alpha"}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.05,
        alpha: NonNegative = 0.4,
        rho_min: NonNegative | None = None,
        lr_max: NonNegative | None = None,
        lr_min: NonNegative = 0.0,
        **kwargs: Any,
    ) -> None:
        own: dict[str, Any] = {"rho": rho, "alpha": alpha, "rho_min": rho_min, "lr_max": lr_max, "lr_min": lr_min}
        super().__init__(params, base_optimizer, **own, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["lr_max"] is None:
            group["lr_max"] = float(group["lr"])

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group["rho_min"] is not None and group["rho_min"] > group["rho"]:
            raise ValueError(f"GSAM: rho_min is {group['rho_min']}, above rho, {group['rho']}: it is the lowest.")

    def radius(self, group: dict[str, Any]) -> Radius:
        rho, low = float(group["rho"]), group["rho_min"]
        span = group["lr_max"] - group["lr_min"]
        if low is not None and span > 0:
            rho = max(0.0, low + (rho - low) * (float(group["lr"]) - group["lr_min"]) / span)
        return Radius.fixed(rho)

    def needs_first(self, group: dict[str, Any]) -> bool:
        return bool(self.first("alpha") > 0)

    def descend(self, g: Vector, g_hat: Vector) -> Vector:
        alpha = float(self.first("alpha"))
        if alpha == 0:
            return g_hat
        share = ratio(g.dot(g_hat), g_hat.norm_sq())
        return g_hat - alpha * (g - share * g_hat)
