"""SAM, Sharpness-Aware Minimization (Foret et al., 2021, Eq. 2; paper, Eq. 2).

    w_hat = w + rho * g / ||g||                          g = grad L(w), one norm over all perturbed parameters
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

Exact: the direction is g/||g|| with no constant added to the norm; a zero gradient perturbs nothing. Cost: two
forward and backward passes a step.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.reference import Radius


class SAM(SharpnessAware, name="sam", along="g"):
    """SAM around any torch optimizer: ``SAM(params, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``, and ``perturb=False`` leaves it out of
            the norm and of the perturbation.
        base_optimizer: the class that makes the update, e.g. ``torch.optim.SGD``.
        rho: radius of the perturbation in parameter space, >= 0. 0 is the base optimizer.
        kwargs: options of `SharpnessAware` (``backend``, ``scope``, ``max_grad_norm``, ``ascent_interval``, ...); the
            rest goes to ``base_optimizer``: ``lr``, ``momentum``, ``weight_decay``, ...

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self, params: ParamsT, base_optimizer: BaseOptimizer, *, rho: NonNegative = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    def radius(self, group: dict[str, Any]) -> Radius:
        return Radius.fixed(float(group["rho"]))
