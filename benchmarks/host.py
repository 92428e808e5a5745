"""What a sharpness-aware step costs on the host: Python, pointer tables and checks, without any kernel.

    python benchmarks/host.py [--tensors 161,400,1000] [--base sgd]

Needs no GPU. The optimizer runs on CPU tensors with backend="triton" (Triton's interpreter allows it), and the one
function through which every Triton kernel is launched, `run` of a @triton.jit function, is replaced by a counter. So
the numbers hold everything up to Triton's own launch, which costs tens of microseconds each on top: see the column of
launches. Allocating and pinning memory is cheaper here than under CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it is read once, at decoration

import torch
from lib.arguments import Parser
from lib.problem import Hyper, set_grads
from lib.providers import base_optimizer, our_optimizer
from lib.report import Report, Result, number, percentiles, table
from lib.summary import HOST_TARGET_SECONDS, HOST_TARGET_TENSORS
from lib.timing import CpuClock, no_collection
from lib.traffic import Base
from torch import Tensor

_HYPER = Hyper(sigma=0.3, rho_max=0.2)
_SHAPE = (4,)  # the fewest bytes: torch's own CPU work must not show
_WARM_UP = 20


@contextmanager
def no_kernels() -> Iterator[list[str]]:
    """Within, launching a Triton kernel does nothing but note its name in the list that is given."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def run(self: Any, *args: object, **kwargs: object) -> None:
        launched.append(self.__name__)

    classes = (JITFunction, InterpretedFunction)
    real = [cls.run for cls in classes]
    for cls in classes:
        cls.run = run
    try:
        yield launched
    finally:
        for cls, function in zip(classes, real, strict=True):
            cls.run = function


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


def measure(tensors: int, base: Base, repeats: int) -> Result:
    """Host seconds of one step over ``tensors`` parameters."""

    def make() -> list[Tensor]:
        return [torch.zeros(_SHAPE) for _ in range(tensors)]

    params: list[Tensor] = [torch.nn.Parameter(p) for p in make()]
    grads = [make() for _ in range(3)]  # three over two calls: every column of a table sees new addresses every step
    optimizer = our_optimizer(params, base, _HYPER, backend="triton")
    halves = (optimizer.first_step, optimizer.second_step)
    result: Result = {"tensors": tensors, "base": base}
    with no_kernels() as launched:
        result["seconds_same"] = seconds_per_step(params, halves, grads[:2], repeats)
        result["seconds"] = seconds_per_step(params, halves, grads, repeats)

        def step() -> None:
            for half, own in zip(halves, grads, strict=False):
                set_grads(params, own)
                half()

        result["seconds_tables"] = seconds_in_ops(optimizer, step, repeats)
        launched.clear()
        step()
        result["launches"] = len(launched)
    if not launched:
        raise SystemExit("no Triton launch was seen: the kernels run some other way, and these numbers mean nothing.")
    alone = base_optimizer(params, base, _HYPER, fused=True)
    result["seconds_base"] = seconds_per_step(params, (alone.step,), grads[:1], repeats)
    return result


def report(results: list[Result]) -> str:
    header = ["tensors", "base", "tables and launches, us", "target, us", "whole step, us", "new addresses, us"]
    header += ["launches", "base alone, us"]
    rows = []
    for r in results:
        tables, same, new = (number(r[k]["p50"], 0, 1e6) for k in ("seconds_tables", "seconds_same", "seconds"))
        target = f"<= {HOST_TARGET_SECONDS * 1e6:.0f}" if r["tensors"] == HOST_TARGET_TENSORS else "-"
        alone = number(r["seconds_base"]["p50"], 0, 1e6)
        rows.append([str(r["tensors"]), r["base"], tables, target, same, new, str(r["launches"]), alone])
    return table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    title = "Host time of one optimizer step, kernels left out"
    output = Report(args, "host.py", torch.device("cpu"), title)
    results = [measure(tensors, base, args.repeats) for base in args.base for tensors in args.tensors]
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
