"""LookSAM (Liu et al., 2022, Algorithm 1).

    every k-th step:   w_hat = w + rho * g / ||g||,  base step with g_hat = grad L(w_hat),
                       g_v = g_hat - (g_hat . g) / ||g||^2 * g                          kept
    other steps:       base step with g + alpha * ||g|| * g_v / ||g_v||

Exact: the formulas above, with inner products and norms over all parameters. The two most used implementations take
them per tensor. Cost: (k + 1) / k forward and backward passes a step, one copy of g and g_v, which is in the
`state_dict`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import Count, NonNegative
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.options import require_nonnegative
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.wrapper import BaseOptimizer

_KEPT = "look_back"


class LookSAM(
    FixedRadius,
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
        own = {"rho": rho, "look_alpha": alpha}
        super().__init__(params, base_optimizer, own, ascent_interval=interval, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        require_nonnegative("LookSAM", "alpha", group["look_alpha"])

    def mixture(self, group: dict[str, Any]) -> tuple[float, float]:
        return 1.0, 1.0  # keeps g; see mixture_factors

    def mixture_factors(self, grads: list[Gradients]) -> Tensor | None:
        inner, square, _ = self._perturbation.dot_kept(grads).unbind()
        share = torch.where(square > 0, inner / square, 0.0)
        for rows, second in zip(self._perturbation.rows, grads, strict=True):
            parts: Gradients = []
            for g_hat, g in zip(second, rows.kept, strict=True):
                parts.append(g_hat if g_hat is None or g is None else torch.addcmul(g_hat, g, -share.to(g)))
            self._memory.replace(_KEPT, rows, parts)
        return torch.stack([torch.ones_like(share), torch.zeros_like(share)])

    def between(self, grads: list[Gradients]) -> None:
        weights = self._perturbation
        kept = [self._memory.read(_KEPT, rows) for rows in weights.rows]
        norm, kept_norm = weights.dot(grads, grads).sqrt(), weights.dot(kept, kept).sqrt()
        factor = float(self.param_groups[0]["look_alpha"]) * torch.where(kept_norm > 0, norm / kept_norm, 0.0)
        for row_grads, row_kept in zip(grads, kept, strict=True):
            for g, g_v in zip(row_grads, row_kept, strict=True):
                if g is not None and g_v is not None:
                    g.addcmul_(g_v.to(g.dtype), factor.to(g))
