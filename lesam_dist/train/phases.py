"""Which part of a step is under way, and how long each part takes, in the time of the device that does the work."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from lesam_dist.parallel.processes import Distributed

DATA, PASS_1, PASS_2 = "data_wait", "pass_1", "pass_2"
OPTIMIZER, COMMUNICATION, OTHER = "optimizer", "communication", "other"
DRAW = "draw"
PHASES = (DATA, DRAW, PASS_1, PASS_2, OPTIMIZER, COMMUNICATION, OTHER)

WAITING, UPDATING, AVERAGING, LOGGING = "waiting for a batch", "updating the weights", "averaging gradients", "logging"
DRAWING = "preparing its batch"
"""What a process says that it begins, beside "pass 1", "pass 2" and so on; see `Progress.move`."""
_PHASE_OF = {
    WAITING: DATA,
    DRAWING: DRAW,
    "pass 1": PASS_1,
    UPDATING: OPTIMIZER,
    AVERAGING: COMMUNICATION,
    LOGGING: OTHER,
}


class Event(Protocol):
    """The part of `torch.cuda.Event` that a `Clock` needs."""

    def record(self) -> object: ...

    def query(self) -> bool: ...

    def synchronize(self) -> object: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class HostEvent:
    """The same on the CPU, which has no queue of work: the time on the host's clock."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.seconds - self.seconds)


def event_of(device: torch.device) -> Callable[[], Event]:
    """The kind of event that times work on a device."""
    return partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else HostEvent


class Clock:
    """How long each phase has taken so far. Nothing waits for the device but `read`.

    On CUDA the device's time is measured, between events in its queue. The host's would say little: it runs ahead of
    the device, and does not wait for a batch that the device itself decodes.

    Args:
        make_event: see `event_of`.
    """

    def __init__(self, make_event: Callable[[], Event]) -> None:
        self._make_event = make_event
        self._begun: deque[tuple[str | None, Event]] = deque()  # each ends where the next begins; None counts nowhere
        self._milliseconds: defaultdict[str, float] = defaultdict(float)

    def begin(self, phase: str) -> None:
        """The phase before ends here, in the order in which work is given to the device."""
        self._begin(phase)
        while len(self._begun) > 1 and self._begun[1][1].query():  # else all events would be kept until `read`
            self._settle()

    def leave_out(self) -> None:
        """Between the last `begin` and the next one nothing is counted: an evaluation, or what ends an epoch."""
        if self._begun:
            self._begun[-1] = None, self._begun[-1][1]

    def read(self) -> dict[str, float]:
        """Seconds of each phase until now, of those that there were; waits for the device."""
        if self._begun:
            self._begin(self._begun[-1][0])
            self._begun[-1][1].synchronize()
            while len(self._begun) > 1:
                self._settle()
        return {phase: milliseconds / 1e3 for phase, milliseconds in self._milliseconds.items()}

    def _begin(self, phase: str | None) -> None:
        event = self._make_event()
        event.record()
        self._begun.append((phase, event))

    def _settle(self) -> None:
        phase, start = self._begun.popleft()
        if phase is not None:
            self._milliseconds[phase] += start.elapsed_time(self._begun[0][1])


class Phases:
    """Tells what a step begins to do: to the other processes, to the clock, and to a profiler's trace.

    Args:
        world: this process among all.
        clock: of this run.
    """

    def __init__(self, world: Distributed, clock: Clock) -> None:
        self.world, self.clock = world, clock
        self._region: record_function | None = None
        self._is_traced = False

    def begin(self, what: str, step: int | None = None) -> None:
        """At each part of a step.

        Args:
            what: "pass 1", "pass 2", ..., or one of the texts above.
            step: as `Progress.move` has it.
        """
        self.world.move(what, step)
        phase = _PHASE_OF.get(what, PASS_2)
        self.clock.begin(phase)
        if phase == COMMUNICATION:
            return  # told by autograd's thread on CUDA, and a region lies within one thread
        self._end_region()
        if self._is_traced:
            self._region = record_function(phase)
            self._region.__enter__()

    def trace(self, on: bool) -> None:
        """Whether each phase that begins is to be a region of a profiler's trace."""
        self._is_traced = on
        self._end_region()

    def _end_region(self) -> None:
        if self._region is not None:
            self._region.__exit__(None, None, None)
            self._region = None
