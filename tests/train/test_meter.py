"""Phases and throughput, in the time of whoever does the work: closed forms on clocks that the test owns."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.data import SyntheticLoader
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.train import trainer
from lesam_dist.train.build import build_network
from lesam_dist.train.flops import Flops
from lesam_dist.train.meter import Meter
from lesam_dist.train.phases import DATA, OTHER, PASS_1, PASS_2, PHASES, Clock, Phases, event_of
from tests import cost_meter
from tests.train.clocks import Device, Event

ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def test_a_device_that_starves_is_seen_though_the_host_never_waits() -> None:
    """Steps of 2 ms, and a batch from the device's own decoder every 5 ms: 3 of 5 ms are lost."""
    device = Device()
    clock = Clock(device.event)
    meter = Meter(clock, 12, 4, (PASS_1,))
    for interval in range(2):
        start = device.milliseconds
        for step in range(4):
            clock.begin(DATA)
            device.wait_until(start + 3 + 5 * step)
            clock.begin(PASS_1)
            meter.count_step()
            device.work(2)
        rate = 12 * 4 / 0.020
        expected = {"images_per_s": rate, "images_per_s_per_device": rate / 4, "data_wait": 0.6, "share_pass_1": 0.4}
        assert meter.rates() == pytest.approx(expected), interval


def test_a_device_that_is_fed_does_not_wait() -> None:
    device = Device()
    clock = Clock(device.event)
    meter = Meter(clock, 12, 1, ())
    for _ in range(4):
        clock.begin(DATA)
        clock.begin(PASS_1)
        meter.count_step()
        device.work(2)
    assert meter.rates()["data_wait"] == 0


def test_every_phase_has_its_own_time(seed: int) -> None:
    """Phases in any order, read at any time, with gaps that nobody counts; each has the sum of its parts."""
    draw, device = random.Random(seed), Device()
    clock = Clock(device.event)
    expected: Counter[str] = Counter()
    for _ in range(60):
        phase, milliseconds = draw.choice(PHASES), draw.choice([0, 1, 2.5, 40])
        clock.begin(phase)
        device.work(milliseconds)
        if draw.random() < 0.2:
            clock.leave_out()
        else:
            expected[phase] += milliseconds / 1e3
        if draw.random() < 0.1:
            device.unread[-1].synchronize()  # the device catches up
        if draw.random() < 0.1:
            assert clock.read() == pytest.approx({p: s for p, s in expected.items() if p in clock.read()})
    found = clock.read()
    assert found == pytest.approx({phase: expected[phase] for phase in found})
    assert sum(found.values()) == pytest.approx(expected.total())


def test_events_are_not_kept_until_the_next_line_of_the_log() -> None:
    device = Device()
    clock = Clock(device.event)
    for step in range(1000):
        clock.begin(DATA)
        device.work(3)
        clock.begin(PASS_1)
        device.work(1)
        if step % 10 == 9:  # the queue is no longer than that
            device.unread[-1].synchronize()
    assert len(clock._begun) <= 21
    assert clock.read() == pytest.approx({DATA: 3.0, PASS_1: 1.0})


def test_on_a_cpu_the_hosts_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(event_of(torch.device("cpu")))
    meter = Meter(clock, 10, 1, ())
    for wait in (0.5, 0.25, 0.25):
        clock.begin(DATA)
        now += wait
        clock.begin(PASS_1)
        meter.count_step()
        now += 1
    rates = meter.rates()
    assert (rates["images_per_s"], rates["data_wait"]) == pytest.approx((30 / 4, 0.25))


def test_operations_are_those_of_the_passes_that_were_made(seed: int) -> None:
    draw, device = random.Random(seed), Device()
    clock = Clock(device.event)
    flops = Flops(forward=draw.uniform(1e9, 9e9), backward=draw.uniform(1e9, 9e9), peak=draw.uniform(1, 9))
    meter = Meter(clock, 8, 2, (), flops)
    for forward, backward in ((8, 8), (4, 0)):
        clock.begin(PASS_1)
        meter.count_step()
        meter.count_images(forward, backward)
        device.work(5)
    rates = meter.rates()
    tflops = (12 * flops.forward + 8 * flops.backward) / 0.010 / 1e12
    assert rates["tflops_per_device"] == pytest.approx(tflops)
    assert flops.peak is not None
    assert rates["mfu"] == pytest.approx(tflops / flops.peak)
    assert "mfu" not in Flops(1, 1).rates(1.0, 1.0)


def test_the_steady_rate_leaves_the_first_interval_out() -> None:
    device = Device()
    clock = Clock(device.event)
    meter = Meter(clock, 6, 1, ())
    assert meter.steady_images_per_s() == 0
    for step, milliseconds in enumerate((500, 20, 20, 20)):
        clock.begin(PASS_1)
        meter.count_step()
        device.work(milliseconds)
        if step == 0:
            assert meter.steady_images_per_s() == pytest.approx(6 / 0.5)
            meter.rates()
    assert meter.steady_images_per_s() == pytest.approx(6 / 0.020)


def test_texts_of_a_step_are_phases() -> None:
    device, begun = Device(), list[str]()
    clock = Clock(device.event)
    clock.begin = begun.append  # type: ignore[method-assign]
    phases = Phases(ALONE, clock)
    for what in ("waiting for a batch", "pass 1", "averaging gradients", "updating the weights", "pass 2", "pass 3"):
        phases.begin(what)
        assert ALONE.progress.at.what == what
    assert begun == [DATA, PASS_1, "communication", "optimizer", PASS_2, PASS_2]


def small_trainer(world: Distributed) -> trainer.Trainer:
    """Of 7 steps on random images, of which each third one is logged; it writes nothing."""
    flags = ["--config", "digits", "--data.batch_size", "4", "--data.image_size", "8", "--data.val_resize", "8"]
    config = parse([*flags, "--epochs", "1", "--logging.every_steps", "3", "--ema.decay", "0.9"])
    loader = SyntheticLoader(
        num_classes=10, image_size=8, batch_size=4, batches=7, seed=0, rank=world.rank, device=world.device
    )
    return trainer.Trainer(
        Classification(config, world), build_network(config, 10, world), (loader, loader), run_dir=None
    )


def test_only_a_logged_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole step of the trainer: neither an event nor a tensor is waited for before the next line is due."""
    device = Device()

    def event() -> Event:
        device.work(1)
        return device.event()

    monkeypatch.setattr(trainer, "event_of", lambda _: event)
    this = small_trainer(ALONE)
    asked: dict[int, tuple[int, int]] = {}
    original = this._train_step

    def train_step(*batch: Any) -> None:
        device.waits = 0
        with cost_meter.Meter() as meter, cost_meter.Waits() as waits:
            original(*batch)
        asked[this.step] = device.waits, meter.reads + waits.total()

    monkeypatch.setattr(this, "_train_step", train_step)
    this.fit()
    this.close()
    assert len(asked) == 7
    for step, (events, tensors) in asked.items():
        # The plain maths on a CPU reads the norm, where nobody waits for it; the kernels do not (tests/optim).
        assert (events, tensors > 1) == ((1, True) if step % 3 == 0 else (0, False)), f"step {step}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_devices_clock_counts() -> None:
    """Nothing but waiting for another stream, behind which the host does not stand: all of the time."""
    decoder = torch.cuda.Stream()
    torch.cuda._sleep(1000)
    clock = Clock(event_of(torch.device("cuda")))
    meter = Meter(clock, 1, 1, ())
    for _ in range(3):
        clock.begin(DATA)
        with torch.cuda.stream(decoder):
            torch.cuda._sleep(50_000_000)
        torch.cuda.current_stream().wait_stream(decoder)
        clock.begin(OTHER)
        meter.count_step()
    assert meter.rates()["data_wait"] > 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_only_a_logged_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself raises where the host waits for the device; in every step but those that are logged."""
    this = small_trainer(Distributed(0, 0, 1, torch.device("cuda", 0)))
    original = this._train_step

    def train_step(*batch: Any) -> None:
        strict = this.step > 0 and (this.step + 1) % 3 != 0  # the first one makes state
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            original(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(this, "_train_step", train_step)
    this.fit()
    this.close()
