"""How much memory the kernels of a step have to move: the model that measured times are held against.

All kernels are limited by memory, so bytes over bandwidth is the time that none of them can beat. Addresses and
scalars, a few bytes per chunk, are not counted. A pass is one read or one write of every element; all tensors of a
parameter have its dtype, so passes times the bytes of an element are the bytes. A test holds this against every byte
that the kernels load and store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch

Base = Literal["sgd", "adamw"]
BASES: tuple[Base, ...] = get_args(Base)
"""Base optimizers: SGD with momentum, and AdamW."""


class Traffic(NamedTuple):
    """Passes that a kernel makes: tensors that it reads, tensors that it writes."""

    kernel: str
    reads: int
    writes: int

    @property
    def passes(self) -> int:
        return self.reads + self.writes


def sum_sq(*, metric: bool = False, ema: bool = False) -> Traffic:
    """Reads g; with a metric also w, with a moving average also that."""
    return Traffic("sum_sq", 1 + metric + ema, 0)


def dots() -> Traffic:
    """Reads both gradients."""
    return Traffic("dots", 2, 0)


def perturb(*, ema: bool = False, moved: bool = True, kept: bool = False) -> Traffic:
    """Reads w and g (and the moving average), writes the copy and w; where rho is 0 (not moved), copies w alone.

    Where g is kept, it is read in any case and written.
    """
    if not moved:
        return Traffic("perturb", 1 + kept, 1 + kept)
    return Traffic("perturb", 2 + ema, 2 + kept)


def restore() -> Traffic:
    """Reads the copy, writes w."""
    return Traffic("restore", 1, 1)


def restore_sgd(*, momentum: bool = True, kept: bool = False) -> Traffic:
    """Reads the copy, g_hat, the buffer and g_kept; writes w and the buffer."""
    return Traffic("restore_sgd", 2 + momentum + kept, 1 + momentum)


def restore_adamw(*, kept: bool = False) -> Traffic:
    """Reads the copy, g_hat, both averages and g_kept; writes w and both averages."""
    return Traffic("restore_adamw", 4 + kept, 3)


def average() -> Traffic:
    """A moving average of the weights, `lesam_dist.train.ema`: reads w and the average, writes the average."""
    return Traffic("average", 2, 1)


def unscale() -> Traffic:
    """`GradScaler.unscale_`, once per gradient: reads and writes it."""
    return Traffic("unscale", 1, 1)


def step(
    base: Base,
    *,
    check_second: bool = True,
    metric: bool = False,
    ema: bool = False,
    momentum: bool = True,
    kept: bool = False,
) -> list[Traffic]:
    """The kernels of one step, in order: norm, perturbation, norm of the second gradient, restore with the update.

    Args:
        base: the base optimizer.
        check_second: whether the second gradient's norm is taken, to see whether it is finite.
        metric, ema: what the direction needs, see `lesam_kernels.sum_sq`.
        momentum: whether SGD has buffers.
        kept: whether the update mixes in the first gradient, which the perturbation saves.
    """
    last = restore_sgd(momentum=momentum, kept=kept) if base == "sgd" else restore_adamw(kept=kept)
    return [sum_sq(metric=metric, ema=ema), perturb(ema=ema, kept=kept), *[sum_sq()] * check_second, last]


def passes(kernels: Sequence[Traffic]) -> int:
    """Passes of all these kernels."""
    return sum(kernel.passes for kernel in kernels)


def seconds(kernels: Sequence[Traffic], numel: int, dtype: torch.dtype, bandwidth: float) -> float:
    """The least time for ``numel`` elements, at ``bandwidth`` bytes read and written per second."""
    return passes(kernels) * numel * dtype.itemsize / bandwidth
