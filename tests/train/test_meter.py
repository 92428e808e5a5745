"""Throughput and the wait for data, in the time of whoever waits: closed forms on clocks that the test owns."""

from __future__ import annotations

import time
from collections import deque

import pytest
import torch

from lesam_dist.train.meter import Meter, event_of


class Device:
    """A queue in which work takes time; the host is always ahead of it, until it waits for an event."""

    def __init__(self) -> None:
        self.milliseconds = 1000.0
        self.unread: deque[Event] = deque()

    def work(self, milliseconds: float) -> None:
        self.milliseconds += milliseconds

    def wait_until(self, milliseconds: float) -> None:
        self.milliseconds = max(self.milliseconds, milliseconds)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.done = device, False

    def record(self) -> None:
        self.at = self.device.milliseconds
        self.device.unread.append(self)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        while not self.done:
            self.device.unread.popleft().done = True

    def elapsed_time(self, end_event: Event) -> float:
        assert self.done
        assert end_event.done, "CUDA raises for an event that has not happened"
        return end_event.at - self.at


def test_a_device_that_starves_is_seen_though_the_host_never_waits(seed: int) -> None:
    """Steps of 2 ms, and a batch from the device's own decoder every 5 ms: 3 of 5 ms are lost."""
    device = Device()
    meter = Meter(12, lambda: Event(device))
    for interval in range(2):
        start = device.milliseconds
        for step in range(4):
            with meter.waiting():
                device.wait_until(start + 3 + 5 * step)
            device.work(2)
        assert meter.rates() == pytest.approx({"images_per_s": 12 * 4 / 0.020, "data_wait": 0.6}), interval


def test_a_device_that_is_fed_does_not_wait() -> None:
    device = Device()
    meter = Meter(12, lambda: Event(device))
    for _ in range(4):
        with meter.waiting():
            pass
        device.work(2)
    assert meter.rates() == pytest.approx({"images_per_s": 12 / 0.002, "data_wait": 0})


def test_events_are_not_kept_until_the_next_line_of_the_log() -> None:
    device = Device()
    meter = Meter(1, lambda: Event(device))
    for step in range(1000):
        with meter.waiting():
            device.work(3)
        device.work(1)
        if step % 10 == 9:  # the queue is no longer than that
            device.unread[-1].synchronize()
    assert len(meter._waits) <= 11
    assert meter.rates()["data_wait"] == pytest.approx(0.75)


def test_on_a_cpu_the_hosts_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter(10, event_of(torch.device("cpu")))
    for wait in (0.5, 0.25, 0.25):
        with meter.waiting():
            now += wait
        now += 1
    assert meter.rates() == pytest.approx({"images_per_s": 30 / 4, "data_wait": 0.25})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_devices_clock_counts() -> None:
    """Nothing but waiting for another stream, behind which the host does not stand: all of the time."""
    decoder = torch.cuda.Stream()
    torch.cuda._sleep(1000)
    meter = Meter(1, event_of(torch.device("cuda")))
    for _ in range(3):
        with meter.waiting():
            with torch.cuda.stream(decoder):
                torch.cuda._sleep(50_000_000)
            torch.cuda.current_stream().wait_stream(decoder)
    assert meter.rates()["data_wait"] > 0.5
