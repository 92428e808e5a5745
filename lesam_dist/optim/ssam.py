"""SSAM, Stable SAM (Tan et al., 2024; paper, section 2).

    w_hat = w + rho * g / ||g||                          one norm over all perturbed parameters
    w     <- base step with g_hat * ||g|| / ||g_hat||    from the exact w; both norms over the same parameters

Exact: the released code, but for its 1e-12 beside both norms: a zero gradient perturbs nothing, and a g_hat of zero
stays zero. Cost: two forward and backward passes a step.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Vector, ratio
from lesam_dist.optim.sam import SAM


class SSAM(SAM, name="ssam", along="g; the update is as long as g"):
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
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    def needs_first(self, group: dict[str, Any]) -> bool:
        return False  # its norm is enough

    def shares_first_gradient(self) -> str | None:
        return "its update is as long as the first gradient, so that the processes' weights drift apart"

    def descend(self, g: Vector, g_hat: Vector) -> Vector:
        return ratio(self.grad_norm, g_hat.perturbed.norm(), otherwise=1.0) * g_hat
