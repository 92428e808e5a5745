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

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative, ShareBelowOne
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.wrapper import BaseOptimizer


class WSAM(FixedRadius, name="wsam", along="g; weighs the sharpness apart from the loss", keeps="g"):
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
        super().__init__(params, base_optimizer, {"rho": rho, "wsam_gamma": gamma, "decouple": decouple}, **kwargs)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not 0 <= group["wsam_gamma"] < 1:
            raise ValueError(f"WSAM: gamma is {group['wsam_gamma']}; it must be in [0, 1).")

    def mixture(self, group: dict[str, Any]) -> tuple[float, float]:
        if self.param_groups[0]["decouple"]:
            return 1.0, 1.0  # see mixture_factors
        a = _weight(group)
        return a, 1 - a

    def mixture_factors(self, grads: list[Gradients]) -> Tensor | None:
        if not self.param_groups[0]["decouple"]:
            return None
        # The base optimizer is given g, and what was kept of it becomes g_hat - g.
        for rows, second in zip(self._perturbation.rows, grads, strict=True):
            for row, (g_hat, g) in enumerate(zip(second, rows.kept, strict=True)):
                if g_hat is None:
                    rows.kept[row] = None  # without g_hat there is no update
                elif g is None:
                    rows.kept[row] = g_hat.clone()
                    g_hat.zero_()
                else:
                    difference = g_hat - g
                    g_hat.copy_(g)
                    g.copy_(difference)
        return torch.eye(2, dtype=torch.float64, device=self.overflow.device)[0]  # (1, 0), made there: no copy

    def updated(self) -> None:
        if not self.param_groups[0]["decouple"]:
            return
        finite = self.overflow == 0
        for rows in self._perturbation.rows:
            for w, difference, index in zip(rows.shards, rows.kept, rows.groups, strict=True):
                if difference is None:
                    continue
                group = self.param_groups[index]
                step = difference * (group["lr"] * _weight(group) * (-1 if group.get("maximize") else 1))
                w.sub_(torch.where(finite.to(w.device), step, 0.0))


def _weight(group: dict[str, Any]) -> float:
    gamma = float(group["wsam_gamma"])
    return gamma / (1 - gamma)
