"""SAM-ON, SAM on normalisation layers only (Mueller et al., 2023).

    w_hat = w + rho * g / ||g||      for the weights and biases of normalisation layers; the norm is over these alone
    w     <- base step with g_hat = grad L(w_hat)        all parameters, from the exact w

Exact: SAM with all other parameters left out of norm and perturbation. Cost: two forward and backward passes a step,
and a copy of the normalisation layers' parameters alone, which are 0.2 % of a ResNet-50.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.arguments import NonNegative
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.sam import SAM

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class SAMON(SAM, name="samon", along="g of normalisation layers alone", keeps="(a copy of these alone)"):
    """SAM-ON around any torch optimizer: ``SAMON(norm_groups(model), torch.optim.SGD, rho=0.5, lr=0.1)``.

    Args:
        params: param groups; those without normalisation layers have ``perturb=False``, as `norm_groups` makes them.
        base_optimizer: the class that makes the update.
        rho: radius, >= 0; larger than SAM's, since it is spread over few parameters.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: where all groups or none are perturbed.
    """

    def __init__(
        self, params: ParamsT, base_optimizer: BaseOptimizer, *, rho: NonNegative = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **kwargs)
        perturbed = [bool(group["perturb"]) for group in self.param_groups]
        if all(perturbed) or not any(perturbed):
            raise ValueError(
                f"SAMON: {sum(perturbed)} of {len(perturbed)} param groups are perturbed; it must be those of "
                "normalisation layers and no other. Make the groups with norm_groups(model)."
            )

    @classmethod
    def settings_of(cls, name: str, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"perturb": is_norm(module)}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's, or one that is called so and is made like one.

    That is, "norm" in its class's name, parameters that are no more than one number per channel, and none in parts:
    timm's ``RmsNorm``, transformers' ``LlamaRMSNorm``, any ``LayerNorm2d``; not a linear layer with a norm in it.
    """
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    return (
        "norm" in type(module).__name__.lower()
        and all(p.numel() == max(p.shape, default=1) for p in own)
        and len(own) == len(list(module.parameters()))
    )


def norm_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two param groups: the parameters of normalisation layers, and with ``perturb=False`` all others.

    Raises:
        ValueError: for a model without normalisation layers.
    """
    norms = [p for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)]
    if not norms:
        raise ValueError(f"SAMON: {type(model).__name__} has no normalisation layer with parameters. Choose SAM.")
    known = set(norms)
    others = [p for p in model.parameters() if p not in known]
    return [{"params": norms, "perturb": True}, {"params": others, "perturb": False}]
