"""A task's loss, with what is wrong in it said in one line: it is code that we have not seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lesam_dist.errors import UserError
from lesam_dist.parallel.batch import Batch, structure
from lesam_dist.tasks.task import Task


def guarded(task: Task, *, per_sample: bool = False) -> Callable[[nn.Module, Batch], Tensor]:
    """``task.loss``, or with ``per_sample`` ``task.losses``, which raises a UserError for what is no such loss."""
    call, name = (task.losses, "losses") if per_sample else (task.loss, "loss")
    where = f"the task {type(task).__name__}: {name}(model, batch)"

    def checked(model: nn.Module, batch: Batch) -> Tensor:
        before = structure(batch)
        value = call(model, batch)
        if not isinstance(value, Tensor):
            raise UserError(f"{where} returned {type(value).__name__}: return the loss, a tensor.")
        if value.ndim != int(per_sample):
            wanted = "one number for each sample, (B,)" if per_sample else "their mean, without dimensions"
            raise UserError(f"{where} returned a tensor of shape {list(value.shape)}: return {wanted}.")
        if not value.is_floating_point():
            raise UserError(f"{where} returned {value.dtype}: a loss is a floating-point number.")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise UserError(f"{where} returned a loss that does not depend on the weights: compute it from model(...).")
        if (after := structure(batch)) != before:
            raise UserError(
                f"{where} changed its batch, which was {before} and is {after} now: the next pass must see the same. "
                "Change a copy, or change it in draw."
            )
        return value

    return checked
