"""MSAM, Momentum-SAM (Becker et al., 2024, Algorithm 1; paper, section 2).

    w_hat = w - rho * v / ||v||                          v: the base optimizer's momentum
    w     <- base step with g_hat = grad L(w_hat)        from the exact w; it also updates v

v is SGD's momentum buffer or Adam's first moment (not bias-corrected, which the norm takes out). The perturbation goes
*with* the coming update, against SAM's. The first step is not perturbed. The released code keeps the weights perturbed
between steps; here they are exact there, so evaluation and checkpoints see w. It is the same sequence but for weight
decay, which here is the base optimizer's: SGD's L2 term is of w (there: of w_hat), and AdamW decays w before its update
(there: after it). Cost: one forward and backward pass a step, one copy.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Vector
from lesam_dist.optim.sam import SAM


class MSAM(SAM, name="msam", along="the base optimizer's momentum", passes="1", one_pass=True):
    """MSAM around SGD with momentum or Adam(W): ``MSAM(params, torch.optim.SGD, rho=3.0, lr=0.1, momentum=0.9)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update; it must have a momentum.
        rho: radius, >= 0; one to two orders larger than SAM's.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range, a base optimizer without momentum, or an option that needs two passes.
    """

    def __init__(
        self, params: ParamsT, base_optimizer: BaseOptimizer, *, rho: NonNegative = 3.0, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not (group.get("momentum") or group.get("betas")):
            name = type(self.base_optimizer).__name__
            raise ValueError(f"MSAM perturbs along the momentum, but {name} has none here: set momentum above 0.")

    def look_ahead(self) -> Vector:
        return -self.momentum()
