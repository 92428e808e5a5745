"""What the kernels need to make a base optimizer's update themselves: its scalars and its state, as torch keeps them.

Only `torch.optim.SGD` and `torch.optim.AdamW` (without amsgrad) are fused with restoring the weights. Any other base
optimizer, or an option not listed here, makes its own step after the weights were restored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from lesam_dist.optim.engine import capturing

SCHEDULED: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    AdamW: ("lr", "betas", "eps", "weight_decay"),
}
"""The base optimizers that the kernels know, and which of their hyper-parameters are read on the device."""

Group = dict[str, Any]
Mixture = tuple[float, float]


@dataclass(frozen=True)
class BaseUpdate:
    """One update that a kernel makes, with the hyper-parameters of this step.

    Attributes:
        kernel: ``restore_sgd`` or ``restore_adamw``.
        columns: names of the state tensors in ``optimizer.state[p]``, torch's.
        scalars: for each param group the row of 7 numbers that the kernel documents.
        dtype: of the scalars on the device.
        stateful: whether the parameters of each group have state (SGD's only with momentum).
        state: the base optimizer's.
    """

    kernel: Literal["restore_sgd", "restore_adamw"]
    columns: tuple[str, ...]
    scalars: list[tuple[float, ...]]
    dtype: torch.dtype
    stateful: list[bool]
    state: dict[Tensor, Any]

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter of a stateful group, made as torch makes it where it is missing."""
        own: dict[str, Tensor] = self.state[p]
        if own.get(self.columns[0]) is None:
            capturing.refuse_new_state(p.device, f"the base optimizer's {self.columns[0]}")
            for name in self.columns:
                is_step = name == "step"
                own[name] = torch.zeros((), device=p.device) if is_step else torch.zeros_like(p)
        elif "step" in own and own["step"].device != p.device:
            own["step"] = own["step"].to(p.device)  # loaded from an optimizer that was not fused
        return own


def base_update(base: Optimizer, mixtures: Sequence[Mixture]) -> BaseUpdate | None:
    """The kernel's update that equals ``base.step()`` with ``a * g_hat + b * g``, or None where there is none.

    Args:
        base: the base optimizer.
        mixtures: ``(a, b)`` of each param group.
    """
    if type(base) not in SCHEDULED:
        return None  # groups and state of others are their own
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None  # they are to see its step, and before it exact weights and final gradients
    groups = base.param_groups
    if any(group["differentiable"] or isinstance(group["lr"], Tensor) for group in groups):
        return None
    signed = [(-a, -b) if group["maximize"] else (a, b) for group, (a, b) in zip(groups, mixtures, strict=True)]
    columns: tuple[str, ...]
    if type(base) is SGD:
        momentum = [group["momentum"] != 0 for group in groups]
        if any(group["dampening"] for group in groups) and any(momentum):
            return None  # torch's very first buffer is the bare gradient; a kernel's, from zeros, would be damped
        columns = ("momentum_buffer",) if any(momentum) else ()
        scalars = [_sgd(group, *ab) for group, ab in zip(groups, signed, strict=True)]
        return BaseUpdate("restore_sgd", columns, scalars, torch.float32, momentum, base.state)
    if not any(group["amsgrad"] for group in groups):
        scalars = [_adamw(group, *ab) for group, ab in zip(groups, signed, strict=True)]
        columns = ("step", "exp_avg", "exp_avg_sq")
        return BaseUpdate("restore_adamw", columns, scalars, torch.float64, [True] * len(groups), base.state)
    return None


def _sgd(group: Group, a: float, b: float) -> tuple[float, ...]:
    nesterov = float(group["nesterov"])
    return (group["lr"], group["momentum"], group["dampening"], group["weight_decay"], nesterov, a, b)


def _adamw(group: Group, a: float, b: float) -> tuple[float, ...]:
    return (group["lr"], *group["betas"], group["eps"], group["weight_decay"], a, b)
