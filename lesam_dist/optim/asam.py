"""ASAM, Adaptive SAM (Kwon et al., 2021, Eq. 5 and Algorithm 1; paper, section 2).

    T     = |w| + eta  (elementwise)                     1 for parameters that are not adaptive
    w_hat = w + rho * T^2 g / ||T g||                    one norm over all perturbed parameters
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

Exact: the formulas above. The paper has T = |w| for weights of layers; the released code has eta = 0.01 beside it, and
T = 1 for every parameter whose name does not hold "weight" (biases, and BatchNorm's beta, but not its gamma). Names are
not known here: give those parameters in groups with ``adaptive=False``, as `adaptive_groups` makes them; without, all
are adaptive, as in the most used SAM code. Cost: two forward and backward passes a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.reference import Direction
from lesam_dist.optim.engine.vectors import Ascent, Vector
from lesam_dist.optim.sam import SAM


class ASAM(SAM, name="asam", along="g in units of the weights' size"):
    """ASAM around any torch optimizer: ``ASAM(adaptive_groups(model), torch.optim.SGD, rho=0.5, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho``, ``eta`` and ``adaptive`` (False: T = 1).
        base_optimizer: the class that makes the update.
        rho: radius in units of the weights' own size, >= 0 (0.5 for CIFAR-10, 1.0 for CIFAR-100).
        eta: added to the weights' size, >= 0.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    group_defaults: ClassVar = {"adaptive": True}

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: NonNegative = 0.5,
        eta: NonNegative = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, eta=eta, **kwargs)

    @classmethod
    def settings_of(cls, name: str, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"adaptive": is_adaptive(name)}

    def climb(self, g: Vector) -> Ascent:
        return Ascent(g, metric=[metric(group) for group in self.param_groups])


def metric(group: dict[str, Any]) -> Direction:
    """``T^2 g`` for a group that is adaptive, else ``g``."""
    return Direction(p=1.0, q=float(group["eta"])) if group["adaptive"] else Direction()


def is_adaptive(name: str) -> bool:
    """The released code's rule: a parameter is adaptive if its name holds "weight"."""
    return "weight" in name


def adaptive_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Param groups by the released code's rule, `is_adaptive`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_rule = {rule: [p for name, p in named if is_adaptive(name) == rule] for rule in (True, False)}
    return [{"params": params, "adaptive": rule} for rule, params in by_rule.items() if params]
