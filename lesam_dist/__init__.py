"""lesam_dist: LE-SAM (Loss-Equated Sharpness-Aware Minimization) and its relatives, at scale."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lesam_dist import optim

if TYPE_CHECKING:
    from lesam_dist.optim import *  # noqa: F403
    from lesam_dist.train.batchnorm import frozen_batchnorm
    from lesam_dist.train.passes import BatchPasses, Passes

__version__ = "0.1.0"
__all__ = ["BatchPasses", "Passes", "__version__", "frozen_batchnorm"]
__all__ += optim.__all__

_OF_TRAIN = {"BatchPasses": "passes", "Passes": "passes", "frozen_batchnorm": "batchnorm"}


def __getattr__(name: str) -> Any:
    if name in _OF_TRAIN:
        return getattr(import_module(f"lesam_dist.train.{_OF_TRAIN[name]}"), name)
    if name not in optim.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
