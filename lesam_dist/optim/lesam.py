"""LE-SAM, Loss-Equated Sharpness-Aware Minimization (paper, Algorithm 1).

    rho   = min(sigma / (||g|| + eps), rho_max)          the loss budget sigma fixes the radius
    w_hat = w + rho * g / ||g||                          g = grad L(w), one norm over all perturbed parameters
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

With ``alpha`` > 0 it is LE-SAM+ (Eq. 16), which minimises ``L(w_hat) + alpha * (L(w_hat) - L(w))``:

    w     <- base step with (1 + alpha) * g_hat - alpha * g        plus_form="paper"
    w     <- base step with g_hat - alpha * g                      plus_form="released", the authors' code

Exact: the formulas above. The authors' code differs in one place: it puts ``eps`` inside the root of the norm
as well, which puts a floor of 1e-6 under it. Cost: two forward and backward passes a step; LE-SAM+ also keeps
one copy of g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.asam import is_adaptive, metric
from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.vectors import Ascent, Vector


class LESAM(
    SharpnessAware,
    name="lesam",
    along="g, as far as the budget allows; `adaptive=True` in ASAM's metric",
    keeps="g with `alpha`",
    budget="sigma",
):
    """LE-SAM around any torch optimizer: ``LESAM(params, torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``sigma``, ``rho_max``, ``norm_eps``,
            ``plus_alpha``, and ``perturb=False`` leaves it out of the norm and of the perturbation.
        base_optimizer: the class that makes the update, e.g. ``torch.optim.SGD``.
        sigma: loss budget, in units of the loss, >= 0. 0 is the base optimizer. Schedule it with `CosineBudget`.
        rho_max: cap on the radius, >= 0; None means no cap. Without one the radius grows without bound as the
            gradient vanishes.
        eps: added to the gradient norm, >= 0 (the paper's stability constant). In the groups it is ``norm_eps``,
            because ``eps`` is Adam's; give Adam another one with ``functools.partial(torch.optim.AdamW, eps=1e-6)``.
        alpha: weight of the surrogate gap in LE-SAM+, >= 0; 0 is LE-SAM. In the groups it is ``plus_alpha``.
        plus_form: which LE-SAM+ gradient, see the module's text.
        adaptive: measure the perturbation in units of the weights' own size, as ASAM does, with ``eta`` added to it:
            ``w_hat = w + rho * T^2 g / ||T g||``, ``rho = min(sigma / (||T g|| + eps), rho_max)``. A group may set its
            own `adaptive`, as `adaptive_groups` does. The authors' code moves along T g instead, whose length in that
            metric is not rho.
        eta: see ``adaptive``, >= 0.
        kwargs: options of `SharpnessAware` (``backend``, ``scope``, ``max_grad_norm``, ``ascent_interval``, ...); the
            rest goes to ``base_optimizer``: ``lr``, ``momentum``, ``weight_decay``, ...

    Raises:
        ValueError: for a value out of range.
    """

    # `eps` and `alpha` are names that Adam and RMSprop keep in the same groups.
    group_names: ClassVar = {"eps": "norm_eps", "alpha": "plus_alpha"}
    of_descent = ("plus_alpha", "plus_form")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        sigma: NonNegative = 0.3,
        rho_max: NonNegative | None = 0.2,
        eps: NonNegative = 1e-12,
        alpha: NonNegative = 0.0,
        plus_form: Literal["paper", "released"] = "paper",
        adaptive: bool = False,
        eta: NonNegative = 0.0,
        **kwargs: Any,
    ) -> None:
        own = {"sigma": sigma, "rho_max": rho_max, "eps": eps, "alpha": alpha, "plus_form": plus_form}
        super().__init__(params, base_optimizer, **own, adaptive=adaptive, eta=eta, **kwargs)

    @classmethod
    def settings_of(cls, name: str, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"adaptive": is_adaptive(name)} if arguments.get("adaptive") else {}

    def radius(self, group: dict[str, Any]) -> Radius:
        rho_max = math.inf if group["rho_max"] is None else float(group["rho_max"])
        return Radius(float(group["sigma"]), rho_max, float(group["norm_eps"]))

    def climb(self, g: Vector) -> Vector | Ascent:
        if not any(group["adaptive"] for group in self.param_groups):
            return g
        return Ascent(g, metric=[metric(group) for group in self.param_groups])

    def needs_first(self, group: dict[str, Any]) -> bool:
        return bool(group["plus_alpha"] > 0)

    def descend(self, g: Vector, g_hat: Vector) -> Vector:
        if not any(map(self.needs_first, self.param_groups)):
            return g_hat
        alpha = self.per_group("alpha")
        a = self.per_group(lambda group: group["plus_alpha"] if group["plus_form"] == "paper" else 0.0)
        return (1 + a) * g_hat - alpha * g
