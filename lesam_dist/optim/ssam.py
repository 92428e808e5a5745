"""SSAM, Stable SAM (Tan et al., 2024; paper, section 2).

    w_hat = w + rho * g / ||g||                          one norm over all perturbed parameters
    w     <- base step with g_hat * ||g|| / ||g_hat||    from the exact w; both norms over the same parameters

Exact: the released code, but for its 1e-12 beside both norms: a zero gradient perturbs nothing, and a g_hat of zero
stays zero. Cost: two forward and backward passes a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.wrapper import BaseOptimizer


class SSAM(FixedRadius, name="ssam", along="g; the update is as long as g"):
    """Stable SAM around any torch optimizer: ``SSAM(params, torch.optim.SGD, rho=0.05, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0. 0 is the base optimizer, to rounding.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self, params: ParamsT, base_optimizer: BaseOptimizer, *, rho: NonNegative = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def shares_first_gradient(self) -> str | None:
        return "its update is as long as the first gradient, so that the processes' weights drift apart"

    def mixture_factors(self, grads: list[Gradients]) -> Tensor | None:
        second = self._perturbation.of_perturbed(grads)
        norm = self._perturbation.dot(second, second).sqrt()
        share = torch.where(norm > 0, self.telemetry["grad_norm"].to(norm.device) / norm, 1.0)
        return torch.stack([share, torch.ones_like(share)])
