"""What `--calibrate` and `--measure` find on this machine is usable; how fast it is no test can say."""

from __future__ import annotations

import math

import pytest
import torch

from lesam_dist.config.command_line import parse
from lesam_dist.parallel.processes import Distributed
from lesam_dist.planning import calibrate
from lesam_dist.planning.collectives import Link
from lesam_dist.planning.input import measure_decode_rate
from tests.parallel.processes import run


def found_link(world: Distributed) -> Link:
    return calibrate.measure_link(world)


def test_the_device_of_this_machine() -> None:
    (link, _) = run(found_link, 2)
    device = calibrate.measure_device(torch.device("cpu"), link, 2)
    assert (device.latency, device.link, device.per_node, device.backend) == (*link, 2, "gloo")
    rates = [*device.peak.values(), device.bandwidth, device.memory, device.floor, *link]
    assert all(0 < rate < math.inf for rate in rates)
    assert set(device.peak) == {"fp32", "tf32", "bf16", "fp16"}
    assert device.floor < 1e-2 < device.bandwidth


def test_a_call_is_timed_by_its_median() -> None:
    left = iter([9, 1, 2, 50])  # the first one does not count
    clock = [0.0]

    def call() -> None:
        clock[0] += next(left)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate.time, "perf_counter", lambda: clock[0])
        assert calibrate.seconds_of(call, 3) == 2


def test_images_are_decoded_from_generated_files() -> None:
    config = parse(["--config", "imagenet_resnet50_lesam", "--data.backend", "torchvision", "--data.workers", "1"])
    assert measure_decode_rate(config, seconds=0.2) > 1
    assert config.data.root is None, "the run's own config is left alone"
