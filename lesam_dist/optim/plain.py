"""The base optimizer alone, on the protocol of the methods: ``w <- base step with grad L(w)``.

What it has of them: a gradient that is not finite, on any rank, leaves the update out and is counted; the norm that
clips depends on no address or thread; float16 is unscaled. Cost: one pass a step, and one more read of the gradients.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.base import Kind, SharpnessAware
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.reference import Radius


class Plain(SharpnessAware):
    """Any torch optimizer, guarded: ``Plain(params, torch.optim.SGD, lr=0.1, momentum=0.9)``.

    Args:
        params: parameters or param groups.
        base_optimizer: the class that makes the update.
        kwargs: ``backend`` and ``max_grad_norm`` of `SharpnessAware`; the rest goes to ``base_optimizer``.
    """

    def __init__(self, params: ParamsT, base_optimizer: BaseOptimizer, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, **kwargs)

    def radius(self, group: dict[str, Any]) -> Radius:
        return Radius(sigma=0.0, rho_max=0.0, eps=0.0)

    def owns_passes(self) -> str:
        return "the base optimizer alone makes one pass a step"

    def kind_of_step(self) -> Kind:
        return "plain"
