"""How many images a run trains on per second, and how long it waits for data, both measured on the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch


class Event(Protocol):
    """The part of `torch.cuda.Event` that `Meter` needs."""

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


class Meter:
    """Throughput since the last reading: images per second over all ranks, and this rank's share of time without data.

    On CUDA the device's time is measured, from the end of a step to the arrival of the next batch. The host's time
    would say little: it runs ahead of the device, and does not wait for a batch that the device itself decodes.

    Args:
        batch_size: images of a step, over all ranks.
        make_event: see `event_of`.
    """

    def __init__(self, batch_size: int, make_event: Callable[[], Event]) -> None:
        self.batch_size = batch_size
        self._make_event = make_event
        self._reset(self._now())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the request for a step's batch."""
        since = self._now()
        yield
        self._waits.append((since, self._now()))
        self._steps += 1
        while self._waits and self._waits[0][1].query():  # else two events would be kept for each step
            self._settle()

    def rates(self) -> dict[str, float]:
        """``images_per_s`` and ``data_wait``; waits for the device, as reading a step's loss does."""
        now = self._now()
        now.synchronize()
        while self._waits:
            self._settle()
        elapsed = self._start.elapsed_time(now)
        rates = {"images_per_s": 1e3 * self._steps * self.batch_size / elapsed, "data_wait": self._waited / elapsed}
        self._reset(now)
        return rates

    def _now(self) -> Event:
        event = self._make_event()
        event.record()
        return event

    def _settle(self) -> None:
        start, end = self._waits.popleft()
        self._waited += start.elapsed_time(end)

    def _reset(self, now: Event) -> None:
        self._start, self._steps, self._waited = now, 0, 0.0  # events count in milliseconds
        self._waits: deque[tuple[Event, Event]] = deque()
