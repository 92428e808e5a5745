"""S2-SAM, Single-Step SAM (Ji et al., 2024; paper, section 2).

    w_hat = w + rho * g_prev / ||g_prev||                g_prev: the gradient of the step before
    g_hat = grad L(w_hat),  g_prev <- g_hat
    w     <- base step with g_hat                        from the exact w

The authors released no code, and public summaries say no more than that the perturbation is made of the last step's
gradient. That this is the gradient at the *perturbed* weights, and that it is normalised, is this library's reading.
The first step is not perturbed. Cost: one forward and backward pass a step, and g_prev, which is in the `state_dict`.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Vector
from lesam_dist.optim.sam import SAM

_PREVIOUS = "previous_grad"


class S2SAM(
    SAM, name="s2sam", along="the gradient of the step before", passes="1", keeps="that gradient", one_pass=True
):
    """S2-SAM around any torch optimizer: ``S2SAM(params, torch.optim.SGD, rho=0.05, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0. 0 is the base optimizer.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range, or an option that needs two passes.
    """

    memory_names = (_PREVIOUS,)

    def __init__(
        self, params: ParamsT, base_optimizer: BaseOptimizer, *, rho: NonNegative = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    def look_ahead(self) -> Vector:
        return self.kept(_PREVIOUS)

    def remember(self, g: Vector, g_hat: Vector) -> None:
        self.keep(_PREVIOUS, g_hat)
