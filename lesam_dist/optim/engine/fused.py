"""torch's fused optimizers as bases: where they can be used, and a step that a flag on the device leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lesam_dist.optim.engine import capturing

_HAS_FUSED = (SGD, Adam, AdamW)


def fused_if_possible(cls: Callable[..., Optimizer], groups: list[Any]) -> dict[str, bool]:
    """``{"fused": True}`` where torch's fused implementation of ``cls`` takes these parameters, else no argument."""
    members = [m for g in groups for m in (g["params"] if isinstance(g, dict) else [g])]
    tensors = [m[1] if isinstance(m, tuple) else m for m in members]
    takes = (
        cls in _HAS_FUSED
        and all(isinstance(t, Tensor) and t.is_floating_point() and t.device.type in ("cpu", "cuda") for t in tensors)
        # torch's fused SGD has no rule for DTensors.
        and not (cls is SGD and any(isinstance(t, DTensor) for t in tensors))
    )
    return {"fused": True} if takes else {}


def unfuse_dtensors(base: Optimizer) -> None:
    """Switch torch's fused SGD off where it would fail; FSDP2 may put DTensors in after construction."""
    if isinstance(base, SGD):
        for group in base.param_groups:
            if group.get("fused") and any(isinstance(p, DTensor) for p in group["params"]):
                group["fused"] = False


def make_momentum(base: Optimizer) -> list[dict[str, Any]]:
    """Make the first momenta of torch's fused SGD, for the parameters that have a gradient; nothing for other bases.

    torch leaves them unwritten memory until an update is made: a skipped first one trains on that memory, and a first
    gradient that comes later than the others is an error.

    Returns:
        The groups left as they were, which must not be fused in this step: with dampening the first momentum is g in
        torch, and would be ``(1 - dampening) * g`` from zeros.
    """
    unready: list[dict[str, Any]] = []
    if not isinstance(base, SGD):
        return unready
    for group in base.param_groups:
        if not group.get("fused") or not group["momentum"]:
            continue
        new = [p for p in group["params"] if p.grad is not None and base.state[p].get("momentum_buffer") is None]
        if new and group["dampening"]:
            unready.append(group)
            continue
        for p in new:
            capturing.refuse_new_state(p.device, "SGD's momentum_buffer")
            base.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return unready


def step_unless(base: Optimizer, overflow: Tensor) -> None:
    """``base.step()`` unless ``overflow`` (float32 0-d) is set; no host sync where torch's fused kernels read it.

    The first momentum of torch's fused SGD is made before, see `make_momentum`.
    """
    unfuse_dtensors(base)
    unready = make_momentum(base)
    if not unready and _reads_found_inf(base):
        base.found_inf = overflow  # type: ignore[attr-defined]
        try:
            base.step()
        finally:
            del base.found_inf  # type: ignore[attr-defined]
    elif capturing.is_capturing(overflow.device):
        raise RuntimeError(
            f"a CUDA graph is captured, but {type(base).__name__} must be told by the host whether to make its update. "
            "Choose SGD or AdamW as the base optimizer, or another one of torch's with fused=True."
        )
    elif not overflow.item():
        for group in unready:
            group["fused"] = False
        try:
            base.step()
        finally:
            for group in unready:
                group["fused"] = True


def _reads_found_inf(base: Optimizer) -> bool:
    """Whether ``base.step()`` is torch's fused one, which keeps the contract of torch.amp, or says that it does."""
    if getattr(base, "reads_found_inf", False):
        return True
    known = type(base) in _HAS_FUSED or getattr(base, "_step_supports_amp_scaling", False)
    return known and all(group.get("fused") for group in base.param_groups)
