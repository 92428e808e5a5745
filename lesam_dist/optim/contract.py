"""What a closure and a base optimizer owe to a sharpness-aware optimizer, checked before anything moves."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def require_closureless(method: str, base: Optimizer) -> None:
    """Raise ValueError for a base optimizer that makes passes of its own."""
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        name = type(base).__name__
        raise ValueError(
            f"{method}: {name}.step() needs a closure, to make passes of its own, so it cannot make the update. Choose "
            "a base optimizer whose step() needs none, as torch.optim.SGD."
        )


def require_loss(method: str, loss: Any, per_sample: bool) -> None:
    """Raise TypeError for what is neither a number nor a tensor of one element, or with ``per_sample`` one of (B,)."""
    if per_sample:
        what, fits = "the loss of each sample, a tensor of shape (B,)", isinstance(loss, Tensor) and loss.dim() == 1
    else:
        what = "the loss, a number or a tensor of one element"
        fits = isinstance(loss, numbers.Real) or (isinstance(loss, Tensor) and loss.numel() == 1)
    if not fits:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{method}: the closure returned {found}: it must return {what}. Nothing was updated.")
