"""This machine as a `Device`: what it reaches, measured in less than a minute, in place of a data sheet.

Under torchrun the collectives of its processes are timed; without it, those of processes that are started here: one for
each GPU, or two on the CPU. Medians throughout.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

from lesam_dist.errors import UserError
from lesam_dist.parallel.place import find_place
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.planning.collectives import Link
from lesam_dist.planning.hardware import Device

_LARGE = 16 * 2**20  # bytes of the all-reduce that shows the bandwidth


def calibrate() -> Device | None:
    """The device of this machine; None on all processes of torchrun but the first.

    Raises:
        UserError: as `lesam_dist.parallel.process_group`.
    """
    if find_place(os.environ).world_size > 1:
        with process_group() as world:
            link = measure_link(world)
            return measure_device(world.device, link, world.local_world_size) if world.is_main else None
    count = torch.cuda.device_count()
    device = torch.device("cuda" if count else "cpu")
    processes = count or 2
    return measure_device(device, _local_link(processes) if processes > 1 else None, processes)


def _local_link(processes: int) -> Link:
    config = LaunchConfig(1, 1, processes, run_id="plan", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.max_restarts = 0
    found: dict[int, Link] = elastic_launch(config, _measure_here)()
    return found[0]


def _measure_here() -> Link:
    torch.set_num_threads(1)
    with process_group() as world:
        return measure_link(world)


def measure_link(world: Distributed) -> Link:
    """Latency and bandwidth of a ring, from all-reduces of two sizes: 2 (n - 1) messages, 2 (n - 1)/n S bytes."""
    n = world.world_size
    small, large = torch.zeros(2, device=world.device), torch.zeros(_LARGE // 4, device=world.device)
    latency = seconds_of(partial(dist.all_reduce, small), 40) / (2 * (n - 1))
    whole = seconds_of(partial(dist.all_reduce, large), 8)
    return Link(latency, 2 * (n - 1) / n * _LARGE / max(whole - 2 * (n - 1) * latency, 1e-9))


def measure_device(device: torch.device, link: Link | None, per_node: int) -> Device:
    """Rates of products in each format, of memory, and the shortest operation; one thread on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        formats: dict[str, tuple[torch.dtype, bool]] = {
            "fp32": (torch.float32, False),
            "tf32": (torch.float32, True),
            "bf16": (torch.bfloat16, False),
        }
        if device.type == "cpu":
            formats.pop("tf32")
        peak = {name: product_rate(device, *how) for name, how in formats.items()}
        peak |= {"fp16": peak["bf16"], "tf32": peak.get("tf32", peak["fp32"])}
        source = torch.zeros((256 if device.type == "cuda" else 64) * 2**18, device=device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), 8)
        tiny = torch.zeros(16, device=device)
        floor = seconds_of(lambda: [tiny.add_(1.0) for _ in range(200)], 5) / 200
    finally:
        torch.set_num_threads(threads)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "this CPU, a thread for each process"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else _host_memory() / per_node
    link = link or Link(1e-5, 1e10)
    cores = (os.cpu_count() or 1) / per_node
    return Device(
        name,
        peak,
        bandwidth,
        float(memory),
        link.bandwidth,
        link.latency,
        per_node,
        cores,
        floor,
        "nccl" if cuda else "gloo",
    )


def product_rate(device: torch.device, dtype: torch.dtype, tf32: bool) -> float:
    """Operations per second of a convolution and a matrix product of usual shapes, half of the work each."""
    batch, side = (64, 4096) if device.type == "cuda" else (2, 512)
    images, kernel = (
        torch.randn(batch, 128, 28, 28, device=device, dtype=dtype),
        torch.randn(128, 128, 3, 3, device=device, dtype=dtype),
    )
    a = torch.randn(side, side, device=device, dtype=dtype)
    if device.type == "cuda":
        images, kernel = (t.to(memory_format=torch.channels_last) for t in (images, kernel))
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        products: list[tuple[Callable[[], Tensor], float]] = [
            (lambda: F.conv2d(images, kernel, padding=1), 2 * images.numel() * 128 * 9),
            (lambda: a @ a, 2 * side**3),
        ]
        each = [seconds_of(call, 8) / flops for call, flops in products]
    finally:
        torch.set_float32_matmul_precision(allowed)
    return 1 / statistics.fmean(each)


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError) as error:
        raise UserError(f"--calibrate cannot find this host's memory: {error}.") from error
