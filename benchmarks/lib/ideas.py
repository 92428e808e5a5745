"""Ideas to move less memory: what each would save, predicted before anything is built.

What was decided, and why, is in kernels/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

from lib import l2, traffic
from lib.l2 import Walk
from lib.traffic import Base


class Idea(NamedTuple):
    """Passes that a step with it does not make, and launches for ``n`` tensors that it saves: ``each * n + once``."""

    name: str
    passes: float
    each: int = 0
    once: int = 0


SWAP = Idea("swapped storages", traffic.perturb().passes - traffic.Traffic("perturb, swapped", 2, 1).passes)
"""The climb writes the perturbed weights into the copy's memory, and parameter and copy trade storages, twice a step:
the exact weights are not written. The restore reads and writes what it does today."""

AVERAGE = Idea("moving average fused into the update", traffic.average().passes - 2, each=1)
"""The update has the new weights in registers: it reads the average and writes it."""

SCALED = Idea("gradients left scaled", 2 * traffic.unscale().passes, once=2)
"""The kernels are given 1/scale, so that nobody unscales either gradient in place."""


_TENSORS = {"perturb": 3, "restore_sgd": 4, "restore_adamw": 5}  # g, w, copy; and buffers


def walk(base: Base, numel: int, itemsize: int, how: Walk, cache: float) -> float:
    """Passes that the climb and the update save by finding in L2 what the norm before them has read.

    Args:
        base: the base optimizer, whose update has more or fewer tensors beside the gradient.
        numel, itemsize: of the gradient.
        how: the order of climb and update.
        cache: bytes of L2 that are of use.
    """
    update = "restore_sgd" if base == "sgd" else "restore_adamw"
    found = [l2.found(numel, itemsize, _TENSORS[kernel], how, cache, second=kernel) for kernel in ("perturb", update)]
    return sum(found)
