"""In place of https://github.com/davda54/sam: ``from lesam_dist.compat.davda54 import SAM``.

    T     = |w| for every parameter if adaptive, else 1
    w_hat = w + rho * T^2 g / ||T g||                    one norm over all parameters
    w     <- base step with g_hat = grad L(w_hat)        from the exact w

Exact: the formulas above, which are that code's but for the 1e-12 that it adds to the norm. Its loops run as they are,
by ``first_step`` and ``second_step`` or by ``step(closure)``, and its checkpoints load. Beyond it: FSDP2, GradScaler, a
step that is skipped where a gradient is not finite, momenta in the `state_dict`. Cost: two forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from lesam_dist.compat.closure import FirstPassIsMade
from lesam_dist.optim.asam import ASAM
from lesam_dist.optim.engine.arguments import Argument
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.registry import arguments_of
from lesam_dist.train.batchnorm import batchnorms

__all__ = ["SAM", "disable_running_stats", "enable_running_stats"]

_HELD = "_lesam_dist_tracked"  # an attribute of a layer whose statistics stand still: what it had before


class SAM(FirstPassIsMade, ASAM):
    """SAM and ASAM, as davda54/sam has them: ``SAM(params, torch.optim.SGD, rho=2.0, adaptive=True, lr=0.1)``.

    Args:
        params: parameters or param groups; a group may set its own ``rho`` and ``adaptive``.
        base_optimizer: the class that makes the update, or an optimizer of the same parameters.
        rho: radius, >= 0; with ``adaptive`` in units of the weights' own size, where 2.0 is recommended.
        adaptive: ASAM, with all parameters in it and nothing added to their size.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, eta=0.0, adaptive=adaptive, **kwargs)

    def arguments(self) -> Mapping[str, Argument]:
        return {
            **arguments_of(ASAM),
            "adaptive": Argument("adaptive", bool, False, "perturb in units of the weights' size"),
        }


def disable_running_stats(model: nn.Module) -> None:
    """BatchNorm's running statistics stand still from now on; as often as it is called, one `enable` ends it.

    In that package the second call in a row loses a layer's momentum, and ``momentum=None`` goes on counting.
    """
    for layer in batchnorms(model):
        if not hasattr(layer, _HELD):
            setattr(layer, _HELD, layer.track_running_stats)
        layer.track_running_stats = False


def enable_running_stats(model: nn.Module) -> None:
    """BatchNorm's running statistics move again, where `disable_running_stats` has stopped them."""
    for layer in batchnorms(model):
        if hasattr(layer, _HELD):
            layer.track_running_stats = getattr(layer, _HELD)
            delattr(layer, _HELD)
