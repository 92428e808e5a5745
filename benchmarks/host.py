"""What a sharpness-aware step costs on the host: Python, pointer tables, checks and launches, down to CUDA's driver.

    python benchmarks/host.py [--tensors 161,400,1000] [--base sgd]

Needs no GPU and no numpy, but a C compiler. The optimizer runs on CPU tensors, as plain parameters and as FSDP2's
DTensors, and Triton specialises, compiles and launches its kernels as for an H100; only libcuda is a stub, which counts
launches and computes nothing (lib/stub_driver.py). Not in the numbers: the driver's own time for a launch, CUDA's
allocator and pinned memory, and what is asked of CUDA only (the current device and stream, whether a graph is
captured).
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read once, when triton is imported

import torch
import torch.distributed as dist
from lib.arguments import Parser
from lib.problem import Hyper, set_grads
from lib.providers import base_optimizer, our_optimizer
from lib.report import Report, Result, number, percentiles, table
from lib.stub_driver import StubDriver, install
from lib.summary import HOST_TARGET_SECONDS, HOST_TARGET_TENSORS, has_host_target
from lib.timing import CpuClock, no_collection
from lib.traffic import Base
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

Layout = Literal["plain", "fsdp2"]

_HYPER = Hyper(sigma=0.3, rho_max=0.2)
_SHAPE = (4,)  # the fewest bytes: torch's own CPU work must not show
_WARM_UP = 20


@contextmanager
def stubbed_gpu() -> Iterator[StubDriver]:
    """Within, kernels are launched on CPU tensors, by Triton's own launcher; there is a process group of one."""
    stub = install()
    from lesam_dist.optim.engine import backend

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(backend, "require_interpreter"):
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield stub
        finally:
            dist.destroy_process_group()


def make_tensors(count: int, layout: Layout) -> list[Tensor]:
    """So many tensors, as a plain model or FSDP2 on one process has them."""
    tensors = [torch.zeros(_SHAPE) for _ in range(count)]
    if layout == "plain":
        return tensors
    mesh = dist.init_device_mesh("cpu", (1,))
    return [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]


def seconds_per_step(
    params: list[Tensor], halves: Sequence[Callable[[], object]], grads: Sequence[list[Tensor]], repeats: int
) -> dict[str, float]:
    """Percentiles of the time of one step, its halves called in turn; setting ``p.grad`` is not part of it.

    ``grads`` are the gradients of each call, in turn: two sets per step mean that addresses change with every call.
    """
    clock, samples = CpuClock(), []
    turns = itertools.cycle(grads)
    with no_collection():
        for _ in range(_WARM_UP + repeats):
            total = 0.0
            for half in halves:
                set_grads(params, next(turns))
                total += clock.device_seconds(half)
            samples.append(total)
    return percentiles(samples[_WARM_UP:])


class TimedOps:
    """Stands in for the optimizer's operations, and adds up the time spent in them: table checks and launches."""

    def __init__(self, ops: Any) -> None:
        self._ops, self.seconds = ops, 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ops, name)

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def seconds_in_ops(optimizer: Any, step: Callable[[], object], repeats: int) -> dict[str, float]:
    """Percentiles of the part of a step that is table checks and launch preparation."""
    plain = optimizer.weights.ops
    timed = TimedOps(plain[0])
    optimizer.weights.ops = [timed]
    samples = []
    with no_collection():
        for _ in range(_WARM_UP + repeats):
            timed.seconds = 0.0
            step()
            samples.append(timed.seconds)
    optimizer.weights.ops = plain
    return percentiles(samples[_WARM_UP:])


def measure(tensors: int, base: Base, layout: Layout, stub: StubDriver, repeats: int) -> Result:
    """Host seconds of one step over ``tensors`` parameters."""
    params: list[Tensor] = [torch.nn.Parameter(p) for p in make_tensors(tensors, layout)]
    # Three over two calls: every column of a table sees new addresses every step.
    grads = [make_tensors(tensors, layout) for _ in range(3)]
    optimizer = our_optimizer(params, base, _HYPER, backend="triton")
    halves = (optimizer.first_step, optimizer.second_step)
    result: Result = {"tensors": tensors, "base": base, "layout": layout}
    result["seconds_same"] = seconds_per_step(params, halves, grads[:2], repeats)
    result["seconds"] = seconds_per_step(params, halves, grads, repeats)

    def step() -> None:
        for half, own in zip(halves, grads, strict=False):
            set_grads(params, own)
            half()

    result["seconds_tables"] = seconds_in_ops(optimizer, step, repeats)
    before = stub.launches
    step()
    result["launches"] = stub.launches - before
    if not result["launches"]:
        raise SystemExit("no launch was seen: the kernels run some other way, and these numbers mean nothing.")
    alone = base_optimizer(params, base, _HYPER, fused=layout == "plain")  # DTensors have no fused SGD
    result["seconds_base"] = seconds_per_step(params, (alone.step,), grads[:1], repeats)
    return result


def report(results: list[Result]) -> str:
    header = [
        "tensors",
        "base",
        "parameters",
        "tables and launches, us",
        "whole step, us",
        "new addresses, us",
        "target",
    ]
    header += ["launches", "base alone, us"]
    rows = []
    for r in results:
        tables, same, new = (number(r[k]["p50"], 0, 1e6) for k in ("seconds_tables", "seconds_same", "seconds"))
        target = f"<= {HOST_TARGET_SECONDS * 1e6:.0f}" if has_host_target(r) else "-"
        alone = number(r["seconds_base"]["p50"], 0, 1e6)
        row = [str(r["tensors"]), r["base"], r["layout"], tables, same, new, target, str(r["launches"]), alone]
        rows.append(row)
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    title = "Host time of one optimizer step, down to CUDA's driver"
    output = Report(args, "host.py", torch.device("cpu"), title)
    cases = [(tensors, base, "plain") for base in args.base for tensors in args.tensors]
    cases += [(HOST_TARGET_TENSORS, base, "fsdp2") for base in args.base]
    with stubbed_gpu() as stub:
        results = [measure(*case, stub, args.repeats) for case in cases]
    output.add(report(results), results)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Parser(__doc__)
    options.add_integers("--tensors", [161, 400, 1000], "lengths of the parameter list; default: 161,400,1000")
    options.add_bases()
    options.add_argument("--repeats", type=int, default=200, metavar="N", help="timed steps of each; default: 200")
    options.add_files()
    return options.parse(argv)


if __name__ == "__main__":
    main()
