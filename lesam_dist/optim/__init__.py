"""Sharpness-aware optimizers: one file per method, on one engine (`engine`).

The names are imported when they are first used: what only reads a config or prints a help needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesam_dist.optim.asam import ASAM, adaptive_groups
    from lesam_dist.optim.bases.lamb import LAMB
    from lesam_dist.optim.bases.lars import LARS
    from lesam_dist.optim.budget import CosineBudget
    from lesam_dist.optim.eigen import EigenSAM
    from lesam_dist.optim.engine.base import SharpnessAware
    from lesam_dist.optim.engine.products import hessian_backward
    from lesam_dist.optim.esam import ESAM
    from lesam_dist.optim.fisher import FisherSAM
    from lesam_dist.optim.friendly import FriendlySAM
    from lesam_dist.optim.gsam import GSAM
    from lesam_dist.optim.lesam import LESAM
    from lesam_dist.optim.looksam import LookSAM
    from lesam_dist.optim.msam import MSAM
    from lesam_dist.optim.s2sam import S2SAM
    from lesam_dist.optim.sam import SAM
    from lesam_dist.optim.samon import SAMON, norm_groups
    from lesam_dist.optim.ssam import SSAM
    from lesam_dist.optim.wsam import WSAM

__all__ = [
    "ASAM",
    "ESAM",
    "GSAM",
    "LAMB",
    "LARS",
    "LESAM",
    "MSAM",
    "S2SAM",
    "SAM",
    "SAMON",
    "SSAM",
    "WSAM",
    "CosineBudget",
    "EigenSAM",
    "FisherSAM",
    "FriendlySAM",
    "LookSAM",
    "SharpnessAware",
    "adaptive_groups",
    "hessian_backward",
    "norm_groups",
]

_OTHERS = {
    "LAMB": "bases.lamb",
    "LARS": "bases.lars",
    "CosineBudget": "budget",
    "SharpnessAware": "engine.base",
    "adaptive_groups": "asam",
    "hessian_backward": "engine.products",
    "norm_groups": "samon",
}


def __getattr__(name: str) -> Any:
    module = f"{__name__}.{_OTHERS[name]}" if name in _OTHERS else _module_of(name)
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def _module_of(name: str) -> str:
    """Where the method of a class is."""
    from lesam_dist.optim.engine.registry import built_in  # reads files: only where a name is asked for

    for method in built_in():
        if method.class_name == name:
            return method.module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
