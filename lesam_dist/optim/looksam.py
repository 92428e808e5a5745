"""LookSAM (Liu et al., 2022, Algorithm 1).

    every k-th step:   w_hat = w + rho * g / ||g||,  base step with g_hat = grad L(w_hat),
                       g_v = g_hat - (g_hat . g) / ||g||^2 * g                          kept
    other steps:       base step with g + alpha * ||g|| * g_v / ||g_v||

Exact: the formulas above, with inner products and norms over all parameters. The two most used implementations take
them per tensor. Cost: (k + 1) / k forward and backward passes a step, one copy of g and g_v, which is in the
`state_dict`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import Count, NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.vectors import Vector, ratio
from lesam_dist.optim.sam import SAM

_KEPT = "look_back"


class LookSAM(
    SAM,
    name="looksam",
    along="g, every 5th step, whose effect the others go on using",
    passes="1.2",
    keeps="g, and that effect",
    without=("ascent_interval", "ascent_between"),
):
    """LookSAM around any torch optimizer: ``LookSAM(params, torch.optim.SGD, rho=0.1, interval=5, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0.
        interval: k, steps from one ascent to the next, >= 1.
        alpha: weight of the kept part, >= 0. In the groups it is ``look_alpha``; the first group's holds for all.
        kwargs: options of `SharpnessAware`, without ``ascent_interval``; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    memory_names = (_KEPT,)
    group_names: ClassVar = {"alpha": "look_alpha"}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.1,
        interval: Count = 5,
        alpha: NonNegative = 0.7,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, ascent_interval=interval, **kwargs)

    def needs_first(self, group: dict[str, Any]) -> bool:
        return True

    def remember(self, g: Vector, g_hat: Vector) -> None:
        self.keep(_KEPT, g_hat - ratio(g_hat.dot(g), g.norm_sq()) * g)

    def between(self, g: Vector) -> Vector:
        g_v = self.kept(_KEPT)
        return g + float(self.first("alpha")) * ratio(g.norm(), g_v.norm()) * g_v
