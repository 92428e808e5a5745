"""lesam_dist: LE-SAM (Loss-Equated Sharpness-Aware Minimization) and its relatives, at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lesam_dist import optim

if TYPE_CHECKING:
    from lesam_dist.optim import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__"]
__all__ += optim.__all__


def __getattr__(name: str) -> Any:
    if name not in optim.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
