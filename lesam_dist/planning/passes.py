"""Seconds of one forward and backward pass on one of several processes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lesam_dist.config.schema import PrecisionConfig
from lesam_dist.parallel.replicas import Sync
from lesam_dist.planning.communication import Layout, Unit
from lesam_dist.planning.machine import Machine
from lesam_dist.planning.profile import Kernels
from lesam_dist.planning.timeline import Block, Span, gather_ahead, in_turn, reduce_behind


def pass_seconds(
    layout: Layout, kernels: Kernels, machine: Machine, precision: PrecisionConfig, *, sync: Sync, backward: bool
) -> Span:
    """A pass that goes through these kernels; ``backward`` False: through those of the forward alone."""
    clock = machine.clock(kernels, precision)
    end = float(clock[-1] if backward else clock[kernels.forward])
    if layout.processes == 1 or (layout.strategy == "ddp" and not (sync and backward)):
        return Span(end, 0.0, 0.0)
    if layout.strategy == "ddp":
        buckets = layout.buckets()
        ready = [float(clock[max(kernels.ready[i] for i in bucket)]) for bucket in buckets]
        times = [sum(machine.seconds(call, layout) for call in layout.reductions(bucket)) for bucket in buckets]
        return reduce_behind(ready, times, end)

    def block(unit: Unit, forward: float, behind: float) -> Block:
        gather = machine.seconds(layout.gather(unit), layout)
        reduce = sum(machine.seconds(call, layout) for call in layout.reduce(unit, sync))
        return (
            Block(forward, behind, gather, unit.freed, reduce) if backward else Block(forward, 0.0, gather, False, 0.0)
        )

    spans = _spans(layout, kernels, clock)
    blocks = [block(unit, *spans[unit.block]) for unit in layout.units if unit.block is not None]
    roots = [block(unit, 0.0, 0.0) for unit in layout.units if unit.block is None]
    rest = end - sum(b.forward + b.backward for b in blocks)
    root = Block(
        max(rest, 0.0),
        0.0,
        sum(b.gather for b in roots),
        any(b.freed for b in roots),
        sum(b.reduce for b in roots),
    )
    return in_turn(root, blocks) if layout.backend == "gloo" else gather_ahead(root, blocks)


def _spans(layout: Layout, kernels: Kernels, clock: NDArray[np.float64]) -> dict[int, tuple[float, float]]:
    """Seconds of each block's forward and backward; a backward ends when the last of its gradients is final."""
    spans = {}
    begun = float(clock[kernels.forward])
    for unit in reversed(layout.units):
        if unit.block is not None:
            start, end = (float(clock[at]) for at in kernels.blocks[unit.block])
            done = max(float(clock[max(kernels.ready[i] for i in unit.members)]), begun)
            spans[unit.block] = (end - start, done - begun)
            begun = done
    return spans
