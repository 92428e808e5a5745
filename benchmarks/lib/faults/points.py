"""Where in a run a fault strikes, and what it does there: plain data, drawn in the parent and sent to the processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fmt: off
Place = Literal[
    "start", "joined", "claimed", "built", "loading", "loaded",  # on the way to the first step
    "pass1", "climbs", "perturbed", "stepped",  # in a step: before and after the first pass and the second
    "save", "saved", "evaluate", "evaluated",
    "files",  # at one of the process's operations on the run's files, in whatever thread
]
# fmt: on

Deed = Literal[
    "signal",  # value: its number, which the process sends to itself
    "stop",  # stops the process, until the parent lets it go on or kills it
    "nan",  # the images of this pass become NaN, on this rank
    "jump",  # value: factor of the loss of this pass
    "clock",  # value: seconds by which the wall clock jumps
    "unplug",  # every connection of the process is shut down
    "fill",  # value: bytes that stay free on the disk of the run
    "free",  # makes room again
    "readonly",  # nothing of the run can be opened for writing, renamed or removed
    "writable",
    "cut",  # tells the parent to cut the link between the hosts
]


@dataclass(frozen=True)
class Point:
    """The first time that a process is at ``place`` with at least ``step`` updates made; then ``after`` more times."""

    place: Place
    step: int = 0
    after: int = 0


@dataclass(frozen=True)
class Action:
    """A process of this rank does ``deed`` at ``point``, once per start; ``rank`` None means every process.

    With ``always`` it is done at this very step, each time that the step is made, as what lies in the data.
    """

    point: Point
    deed: Deed
    value: float = 0.0
    rank: int | None = None
    always: bool = False
