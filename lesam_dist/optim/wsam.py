"""WSAM, Weighted SAM (Yue et al., 2023, Algorithms 1 and 2).

    a     = gamma / (1 - gamma)
    w_hat = w + rho * g / ||g||                          one norm over all perturbed parameters
    w     <- base step with g, then w <- w - lr * a * (g_hat - g)        decoupled
    w     <- base step with a * g_hat + (1 - a) * g                      coupled

Exact: the formulas above. The released code perturbs each process by its own gradient and clips both gradients; here
the averaged one perturbs and ``max_grad_norm`` clips g_hat alone. A missing g counts as zero; without g_hat there is no
update. gamma = 0.5 (a = 1) with ``decouple=False`` is SAM, gamma = 0 the base optimizer. Cost: two forward and backward
passes a step, one copy of g.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative, ShareBelowOne
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Update, Vector
from lesam_dist.optim.sam import SAM


class WSAM(SAM, name="wsam", along="g; weighs the sharpness apart from the loss", keeps="g"):
    """WSAM around any torch optimizer: ``WSAM(params, torch.optim.SGD, rho=0.05, gamma=0.9, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho`` and ``wsam_gamma``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0.
        gamma: weight of the sharpness, in [0, 1). In the groups it is ``wsam_gamma``.
        decouple: keep the sharpness term out of the base optimizer's momentum and scaling.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    group_names: ClassVar = {"gamma": "wsam_gamma"}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.05,
        gamma: ShareBelowOne = 0.9,
        decouple: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, gamma=gamma, decouple=decouple, **kwargs)

    def needs_first(self, group: dict[str, Any]) -> bool:
        return bool(self.first("decouple") or group["wsam_gamma"] != 0.5)  # 1/2, coupled, is SAM

    def descend(self, g: Vector, g_hat: Vector) -> Vector | Update:
        a = self.per_group(lambda group: group["wsam_gamma"] / (1 - group["wsam_gamma"]))
        if self.first("decouple"):
            return Update(along=g, beside=a * (g_hat - g))
        return a * g_hat + (1 - a) * g
