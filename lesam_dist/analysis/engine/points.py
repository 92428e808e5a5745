"""Many values that do not depend on each other, each made by one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.parallel.processes import Distributed

_AT_ONCE = 8  # points of a process between two meetings: what a killed run has lost


def each_once(
    names: list[str],
    value: Callable[[int], Any],
    world: Distributed | None = None,
    journal: Journal | None = None,
    on_point: Callable[[int], None] | None = None,
) -> list[Any]:
    """``[value(0), value(1), ...]``, of which the processes make equal shares; all of them on every process.

    Args:
        names: of the values in the journal, a different one for each.
        value: makes the i-th, on one process without the others; JSON must have it.
        world: this process among all; None for one alone.
        journal: keeps what is done, for the next try, which may be on another number of processes.
        on_point: called with the number of values that are known so far.
    """
    kept = Journal() if journal is None else journal  # an empty one is false
    rank, world_size = (world.rank, world.world_size) if world else (0, 1)
    missing = [i for i, name in enumerate(names) if name not in kept]
    step = _AT_ONCE * world_size
    for begin in range(0, len(missing), step):
        now = missing[begin : begin + step]
        made = {i: value(i) for i in now[rank::world_size]}
        shares = world.gather(made) if world else [made]
        for i in now:
            kept.put(names[i], shares[now.index(i) % world_size][i])
        if on_point:
            on_point(len(names) - len(missing) + begin + len(now))
    return [kept[name] for name in names]
