"""What a closure and a base optimizer owe to a sharpness-aware optimizer, checked before anything moves."""

from __future__ import annotations

import inspect
import numbers
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lesam_dist.optim.engine import capturing
from lesam_dist.parallel.shards import local_shard


def require_closureless(method: str, base: Optimizer) -> None:
    """Raise ValueError for a base optimizer that makes passes of its own."""
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        name = type(base).__name__
        raise ValueError(
            f"{method}: {name}.step() needs a closure, to make passes of its own, so it cannot make the update. Choose "
            "a base optimizer whose step() needs none, as torch.optim.SGD."
        )


def require_whole_batches(method: str) -> None:
    """Raise RuntimeError under accelerate's gradient accumulation, where most batches are never seen by a closure."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return
    count = state.GradientState().num_steps
    if count > 1:
        raise RuntimeError(
            f"{method}.step: Accelerator(gradient_accumulation_steps={count}) calls step for one batch in {count}, and "
            "its closure never sees the others. Leave it at 1, and give step a list of closures, one for each batch."
        )


def require_training_mode(method: str, base: Optimizer) -> None:
    """Raise RuntimeError for a schedule-free base optimizer in its mode for evaluation, which refuses to step."""
    if any(group.get("train_mode") is False for group in base.param_groups):
        raise RuntimeError(
            f"{method}: its base optimizer, {type(base).__name__}, holds the weights of an evaluation. Write "
            "optimizer.train() before you train, and optimizer.eval() before you evaluate or save."
        )


def has_gradients(params: Iterable[Tensor]) -> bool:
    """Whether any gradient is not zero."""
    return any(bool(local_shard(p.grad).any()) for p in params if p.grad is not None)


def require_no_gradients(method: str, params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where there are gradients that the passes of ``step(closure)`` would drop; zeros are none."""
    params = list(params)
    if any(p.grad is not None and capturing.is_capturing(p.device) for p in params):
        raise RuntimeError(
            f"{method}.step: a CUDA graph is captured while there are gradients. Call zero_grad() before the capture, "
            "so that they are made in the graph's memory; or, where they must stay in place, set static_grads=True."
        )
    if has_gradients(params):
        raise RuntimeError(
            f"{method}.step(closure) makes both passes itself, and would drop the gradients that are there. If they "
            "were accumulated (Lightning's accumulate_grad_batches), give step a list of closures, one for each batch. "
            "If they are the first pass of SAM code whose closure is the second, let the closure be both, or call "
            "first_step and second_step. If they are of no use, call zero_grad() first."
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
