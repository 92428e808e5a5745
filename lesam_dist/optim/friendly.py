"""F-SAM, Friendly SAM (Li et al., 2024, Algorithm 1; paper, section 2).

    d     = g - sigma * m                                the batch's own part of its gradient
    w_hat = w + rho * d / ||d||                          one norm over all perturbed parameters
    m     <- lam * m + (1 - lam) * g                     an average of gradients, g itself the first time
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

Exact: the released code, in which d takes m from before its update. The paper takes the updated m: for sigma = 1 that
is the same direction, since g - m_new = lam * (g - m). Before a parameter has an average, d = g. Cost: two forward and
backward passes a step, m, one tensor per parameter, which is in the `state_dict`, and during the second pass m's next
value, which a skipped step must not keep.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative, Share
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Vector
from lesam_dist.optim.sam import SAM

_AVERAGE = "friendly_ema"


class FriendlySAM(
    SAM,
    name="fsam",
    along="g less its moving average",
    keeps="the average; in the second pass also its next value",
):
    """F-SAM around any torch optimizer: ``FriendlySAM(params, torch.optim.SGD, rho=0.2, lam=0.6, lr=0.05)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho`` and ``friendly_sigma``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0.
        sigma: share of the average that is taken off the gradient, >= 0; 0 is SAM. In the groups ``friendly_sigma``.
        lam: share of the average that a step keeps, in [0, 1].
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    memory_names = (_AVERAGE,)
    group_names: ClassVar = {"sigma": "friendly_sigma", "lam": "friendly_lam"}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.2,
        sigma: NonNegative = 1.0,
        lam: Share = 0.6,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, sigma=sigma, lam=lam, **kwargs)

    def climb(self, g: Vector) -> Vector:
        return g - self.per_group("sigma") * self.kept(_AVERAGE)

    def remember_first(self, g: Vector) -> None:
        self.keep_average(_AVERAGE, g, weight=1 - float(self.first("lam")))
