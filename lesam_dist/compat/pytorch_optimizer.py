"""In place of the SAM classes of pytorch_optimizer 4: ``from lesam_dist.compat.pytorch_optimizer import SAM``.

`SAM`, `FriendlySAM` and `WSAM` with that package's arguments, defaults and numbers, and its ``step(closure)``: the
first pass has been made, but for WSAM, whose closure is called twice. The formulas are those of the classes that they
derive from.

Not offered, each with an error: ``use_gc``, ``adaptive`` other than SAM's, a ``perturb_eps`` that would matter. Its
LookSAM takes inner products per tensor, which `lesam_dist.LookSAM` takes over all parameters, as the paper does; its
GSAM needs a scheduler and a model, which `lesam_dist.GSAM` does without: neither can be a drop-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from lesam_dist import optim
from lesam_dist.compat import davda54
from lesam_dist.compat.closure import FirstPassIsMade
from lesam_dist.optim.engine.arguments import Argument
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.registry import arguments_of
from lesam_dist.optim.engine.rule import Closure
from lesam_dist.train.batchnorm import frozen_batchnorm

__all__ = ["SAM", "WSAM", "FriendlySAM"]


class SAM(davda54.SAM):
    """``SAM(params, torch.optim.AdamW, rho=0.05, adaptive=False, lr=1e-3)``.

    Args:
        params: parameters or param groups.
        base_optimizer: the class that makes the update, or an optimizer of the same parameters.
        rho: radius, >= 0.
        adaptive: ASAM, with all parameters in it.
        use_gc: True is refused.
        perturb_eps: at most 1e-8; nothing is added to the norm here.
        foreach: for ``base_optimizer``, unless None.
        kwargs: options of `SharpnessAware`; the rest goes to ``base_optimizer``.

    Raises:
        ValueError: for a value out of range, or what is not offered.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        use_gc: bool = False,
        perturb_eps: float = 1e-12,
        foreach: bool | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= _checked("SAM", perturb_eps, foreach, use_gc=use_gc)
        super().__init__(params, base_optimizer, rho, adaptive, **kwargs)


class FriendlySAM(FirstPassIsMade, optim.FriendlySAM):
    """``FriendlySAM(params, torch.optim.SGD, rho=0.05, sigma=1.0, lmbda=0.9, lr=0.1)``.

    Args:
        sigma: share of the average that is taken off the gradient, >= 0.
        lmbda: ``lam`` of `lesam_dist.FriendlySAM`.
        adaptive: True is refused.
        params, base_optimizer, rho, perturb_eps, foreach, kwargs: as in `SAM`.

    Raises:
        ValueError: for a value out of range, or what is not offered.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: bool = False,
        perturb_eps: float = 1e-12,
        foreach: bool | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= _checked("FriendlySAM", perturb_eps, foreach, adaptive=adaptive)
        super().__init__(params, base_optimizer, rho=rho, sigma=sigma, lam=lmbda, **kwargs)

    def arguments(self) -> Mapping[str, Argument]:
        return arguments_of(optim.FriendlySAM)


class WSAM(optim.WSAM):
    """``WSAM(model, params, torch.optim.AdamW, rho=0.05, gamma=0.9, lr=1e-3)``; its closure is called twice.

    Args:
        model: whose BatchNorm statistics stand still in the second pass.
        gamma: weight of the sharpness, in [0, 1).
        decouple: keep the sharpness term out of the base optimizer's momentum and scaling.
        max_norm: ``max_grad_norm`` of `SharpnessAware`.
        eps: as ``perturb_eps`` of `SAM`, under that package's name; the base optimizer keeps its own default.
        adaptive: True is refused.
        params, base_optimizer, rho, foreach, kwargs: as in `SAM`.

    Raises:
        ValueError: for a value out of range, or what is not offered.
    """

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        rho: float = 0.05,
        gamma: float = 0.9,
        adaptive: bool = False,
        decouple: bool = True,
        max_norm: float | None = None,
        eps: float = 1e-12,
        foreach: bool | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= _checked("WSAM", eps, foreach, adaptive=adaptive)
        self.model = model
        super().__init__(
            params, base_optimizer, rho=rho, gamma=gamma, decouple=decouple, max_grad_norm=max_norm, **kwargs
        )

    def arguments(self) -> Mapping[str, Argument]:
        return arguments_of(optim.WSAM)

    def second_pass(self, closure: Closure) -> Any:
        with frozen_batchnorm(self.model):
            return super().second_pass(closure)


def _checked(owner: str, eps: float, foreach: bool | None, **flags: bool) -> dict[str, bool]:
    """What goes to the base optimizer, after what is not offered was refused."""
    for name, value in flags.items():
        if value:
            raise ValueError(
                f"{owner}: {name} is {value!r}, which is not offered: leave it out, or stay with pytorch_optimizer."
            )
    if not 0 <= eps <= 1e-8:
        raise ValueError(
            f"{owner}: {eps!r} is to be added to the norm, and nothing is here: leave it at 1e-12, which changes no "
            "number that training would show."
        )
    return {} if foreach is None else {"foreach": foreach}
