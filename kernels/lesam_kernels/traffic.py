"""How many bytes a step has to move: the model that measured times are held against.

All kernels are limited by memory, so bytes over bandwidth is the time that none of them can beat. Addresses and
scalars, a few bytes per chunk, are not counted.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Update = Literal["sgd", "adamw"]


class Traffic(NamedTuple):
    """Bytes per element that a kernel reads and writes."""

    kernel: str
    reads: int
    writes: int

    @property
    def bytes(self) -> int:
        return self.reads + self.writes


def sum_sq(w: torch.dtype, g: torch.dtype, *, metric: bool = False, ema: bool = False) -> Traffic:
    """Reads g; with a metric also w, with a moving average also that."""
    return Traffic("sum_sq", g.itemsize * (1 + ema) + w.itemsize * metric, 0)


def dots(g: torch.dtype) -> Traffic:
    """Reads both gradients."""
    return Traffic("dots", 2 * g.itemsize, 0)


def perturb(w: torch.dtype, g: torch.dtype, *, ema: bool = False, moved: bool = True) -> Traffic:
    """Reads w and g (and the moving average), writes the copy and w; where rho is 0 (not moved), copies w alone."""
    if not moved:
        return Traffic("perturb", w.itemsize, w.itemsize)
    return Traffic("perturb", w.itemsize + g.itemsize * (1 + ema), 2 * w.itemsize)


def restore(w: torch.dtype) -> Traffic:
    """Reads the copy, writes w."""
    return Traffic("restore", w.itemsize, w.itemsize)


def restore_sgd(w: torch.dtype, g: torch.dtype, *, momentum: bool = True, kept: bool = False) -> Traffic:
    """Reads the copy, g_hat, the buffer and g_kept; writes w and the buffer."""
    return Traffic("restore_sgd", w.itemsize * (1 + momentum) + g.itemsize * (1 + kept), w.itemsize * (1 + momentum))


def restore_adamw(w: torch.dtype, g: torch.dtype, *, kept: bool = False) -> Traffic:
    """Reads the copy, g_hat, both averages and g_kept; writes w and both averages."""
    return Traffic("restore_adamw", 3 * w.itemsize + g.itemsize * (1 + kept), 3 * w.itemsize)


def step(
    update: Update,
    w: torch.dtype = torch.float32,
    g: torch.dtype | None = None,
    *,
    metric: bool = False,
    ema: bool = False,
    momentum: bool = True,
    kept: bool = False,
) -> list[Traffic]:
    """The kernels of one step, in order: norm, perturbation, norm of the second gradient, restore with the update.

    Args:
        update: the base optimizer.
        w, g: dtypes of parameters and gradients; None where they are the same.
        metric, ema: what the direction needs, see `lesam_kernels.sum_sq`.
        momentum: whether SGD has buffers.
        kept: whether the update mixes in the first gradient. Saving it is a copy of the caller's, and not counted.
    """
    g = g or w
    last = restore_sgd(w, g, momentum=momentum, kept=kept) if update == "sgd" else restore_adamw(w, g, kept=kept)
    return [sum_sq(w, g, metric=metric, ema=ema), perturb(w, g, ema=ema), sum_sq(w, g), last]


def step_bytes(
    numel: int,
    update: Update,
    w: torch.dtype = torch.float32,
    g: torch.dtype | None = None,
    *,
    metric: bool = False,
    ema: bool = False,
    momentum: bool = True,
    kept: bool = False,
) -> int:
    """Bytes that one step moves for ``numel`` elements on this device; the arguments are those of `step`."""
    kernels = step(update, w, g, metric=metric, ema=ema, momentum=momentum, kept=kept)
    return numel * sum(traffic.bytes for traffic in kernels)


def predicted_seconds(num_bytes: int, bandwidth: float) -> float:
    """The least time for ``num_bytes`` at ``bandwidth`` bytes per second."""
    return num_bytes / bandwidth
