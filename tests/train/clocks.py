"""A device's queue of work, on a clock that the test owns, and the events in it."""

from __future__ import annotations

from collections import deque


class Device:
    """A queue in which work takes time; the host is always ahead of it, until it waits for an event."""

    def __init__(self) -> None:
        self.milliseconds = 1000.0
        self.unread: deque[Event] = deque()
        self.waits = 0

    def work(self, milliseconds: float) -> None:
        self.milliseconds += milliseconds

    def wait_until(self, milliseconds: float) -> None:
        self.milliseconds = max(self.milliseconds, milliseconds)

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.done = device, False

    def record(self) -> None:
        self.at = self.device.milliseconds
        self.device.unread.append(self)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.device.waits += 1
        while not self.done:
            self.device.unread.popleft().done = True

    def elapsed_time(self, end_event: Event) -> float:
        assert self.done
        assert end_event.done, "CUDA raises for an event that has not happened"
        return end_event.at - self.at
