"""Clocks for a call that may run on a GPU: device time, host time, the bandwidth of a plain copy, and a time budget."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Call = Callable[[], object]

_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU so far (H100: 50 MB)
_COPY_BYTES = 2**30
_LONGEST_HIDE = 0.05  # seconds
_ENQUEUE = 5e-4  # seconds: more than the host needs for one launch


class Deadline:
    """A time budget in seconds; None never ends. A benchmark asks before each piece of work, and keeps what it has."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    def share(self, parts: int) -> Deadline:
        """A deadline for the next of ``parts`` pieces of work that have what is left in common."""
        return Deadline(None if self._end is None else (self._end - time.monotonic()) / parts)


class CpuClock:
    """Wall time; there is no queue, so host and device time are one."""

    def device_seconds(self, call: Call, host_seconds: float | None = None) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def each_device_seconds(self, calls: Sequence[Call]) -> list[float]:
        """`device_seconds` of each of several calls in a row, with nothing between them."""
        return [self.device_seconds(call) for call in calls]

    def host_seconds(self, call: Call) -> tuple[float, float] | None:
        return None

    def copy_bandwidth(self) -> float | None:
        return None


class CudaClock(CpuClock):
    """CUDA events around a call, with a cold L2 and with the host out of the way.

    Cold, because a backward pass lies between the two halves of a real step. Out of the way, because the device is
    busy with that backward pass while the host enqueues: a spinning kernel stands in for it, so that the events
    see the call's kernels back to back. The host's own time is measured apart (`host_seconds`).
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._seconds_per_cycle = 1e-9
        cycles = 20_000_000
        self._spin(cycles)  # the first one only wakes the device up
        self._seconds_per_cycle = self._spin(cycles) / cycles

    def device_seconds(self, call: Call, host_seconds: float | None = None) -> float:
        """Seconds between two events around ``call``.

        ``host_seconds``, what `host_seconds` found, is how long the device is kept busy first. A call of more than
        about a thousand launches fills the queue and waits for the device all the same, as it would in training.
        """
        hide = min(2 * (host_seconds or 0.0) + 1e-4, _LONGEST_HIDE)
        self._flush.zero_()
        torch.cuda._sleep(int(hide / self._seconds_per_cycle))
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3

    def each_device_seconds(self, calls: Sequence[Call]) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        self._flush.zero_()
        torch.cuda._sleep(int(_ENQUEUE * len(calls) / self._seconds_per_cycle))
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        marks[-1].synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks)]

    def host_seconds(self, call: Call) -> tuple[float, float]:
        """Seconds until ``call`` returns, and until an idle device has done it."""
        self._flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return returned - start, time.perf_counter() - start

    def copy_bandwidth(self) -> float:
        """Bytes read and written per second by torch's device-to-device copy of 1 GiB: what 100 % means here."""
        source, target = (torch.empty(_COPY_BYTES, dtype=torch.uint8, device=self._flush.device) for _ in range(2))
        source.zero_()
        seconds = [self.device_seconds(lambda: target.copy_(source)) for _ in range(20)]
        return 2 * _COPY_BYTES / statistics.median(seconds[5:])

    def _spin(self, cycles: int) -> float:
        self._start.record()
        torch.cuda._sleep(cycles)
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3


@contextmanager
def no_collection() -> Iterator[None]:
    """Within, Python's garbage collector does not run: a collection in a timed call would be an outlier."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def make_clock(device: torch.device) -> CpuClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def step_seconds(step: Call, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of ``repeats`` steps in a row, with the host running ahead as it does in training."""
    if device.type != "cuda":
        return [CpuClock().device_seconds(step) for _ in range(repeats)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    step()  # from an idle device, so that the host's start is in its time
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks)]
