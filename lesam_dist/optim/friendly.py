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

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative, Share
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.options import require_nonnegative
from lesam_dist.optim.engine.reference import Direction
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.weights import Aim
from lesam_dist.optim.engine.wrapper import BaseOptimizer

_AVERAGE = "friendly_ema"


class FriendlySAM(
    FixedRadius,
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
        super().__init__(params, base_optimizer, {"rho": rho, "friendly_sigma": sigma, "friendly_lam": lam}, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        require_nonnegative("FriendlySAM", "sigma", group["friendly_sigma"])
        if not 0 <= group["friendly_lam"] <= 1:
            raise ValueError(f"FriendlySAM: lam is {group['friendly_lam']}; it must be in [0, 1].")

    def aim(self, grads: list[Gradients]) -> Aim:
        directions = [Direction(ema_scale=float(group["friendly_sigma"])) for group in self.param_groups]
        pairs = zip(self._perturbation.rows, grads, strict=True)
        return Aim(grads, directions, [self._memory.read_or_zero(_AVERAGE, rows, g) for rows, g in pairs])

    def ascended(self, grads: list[Gradients]) -> None:
        weight = 1 - float(self.param_groups[0]["friendly_lam"])
        for rows, row_grads in zip(self._perturbation.rows, grads, strict=True):
            self._memory.blend(_AVERAGE, rows, row_grads, weight)
