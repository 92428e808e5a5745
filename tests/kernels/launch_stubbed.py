"""Launch every kernel plainly and directly on a stubbed driver, and print what reached it: run by test_launch.py.

Everything down to CUDA's own launch is Triton's, see benchmarks/lib/stub_driver.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.lib.stub_driver import StubDriver, install
from lesam_kernels import TensorTable, dots, perturb, restore, restore_adamw, restore_sgd, sum_sq
from lesam_kernels.launch import Launcher

Seen = tuple[int, int, list[int]]  # the compiled kernel, the grid, the parameters


class Spy:
    """A launcher that makes each launch in the plain way, then as a new launcher does, and then as a known one."""

    def __init__(self, stub: StubDriver) -> None:
        self._stub, self._direct = stub, Launcher()
        self.seen: list[dict[str, Any]] = []

    def __call__(self, kernel: Any, programs: int, *args: Tensor | int | None, **constants: Any) -> None:
        given = [arg for arg in args if arg is not None]
        self._stub.record(len(given))

        def launched(launch: Callable[[], object]) -> tuple[Seen, int]:
            before = self._stub.launches
            with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as front_end:
                launch()
            assert self._stub.launches == before + 1
            last = self._stub.last
            pairs = zip(last.params, given, strict=True)
            params = [value & 0xFFFFFFFF if isinstance(arg, int) else value for value, arg in pairs]
            return (last.function, last.grid, params), front_end.call_count

        plain = launched(lambda: kernel[(programs,)](*args, **constants))
        expected = [arg if isinstance(arg, int) else arg.data_ptr() for arg in given]
        first, again = (launched(lambda: self._direct(kernel, programs, *args, **constants)) for _ in range(2))
        ways = {"plain": plain, "first": first, "again": again}
        self.seen.append({"kernel": kernel.__name__, "arguments": expected, **ways})


def launch_all(table: TensorTable) -> None:
    """Every kernel, with and without what is optional."""
    squared, found_inf, skipped = sum_sq(table, "g"), torch.zeros(1), torch.zeros(1)
    metric, scale = torch.rand(1, 2), torch.rand(1)
    sum_sq(table, "g", metric=metric)
    sum_sq(table, "g", ema_scale=scale, perturbed_only=True)
    dots(table, "g", "g_hat")
    radius, row = torch.rand(1, 3, dtype=torch.float64), torch.rand(1, 7)
    perturb(table, squared, radius)
    perturb(table, squared, radius, metric=metric, ema_scale=scale, keep=True, found_inf=found_inf, raise_only=True)
    restore(table)
    restore_sgd(table, row, found_inf)
    restore_sgd(table, torch.rand(11)[1:8].view(1, 7), found_inf)  # at an address of which nothing is known
    a_factors, b_factors = torch.rand(2, 1, dtype=torch.float64)
    told = {"sum_sq": squared, "skipped": skipped, "a_factors": a_factors, "b_factors": b_factors}
    restore_adamw(table, row.double(), found_inf, **told)
    table.clear("g_kept")
    table.clear("momentum_buffer")
    restore_sgd(table, row, found_inf)


def launch_all_of_nothing(table: TensorTable) -> None:
    """The launches that a table without rows makes."""
    stats = perturb(table, torch.zeros((), dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
    restore_sgd(table, torch.rand(1, 7), torch.zeros(1), sum_sq=stats[0], skipped=torch.zeros(1))


def table_of(*dtypes: torch.dtype) -> TensorTable:
    w = [torch.ones(numel, dtype=dtype) for dtype in dtypes for numel in (5, 40_000)]
    table = TensorTable("cpu")
    table.build(w, [0] * len(w))
    for column in ("copy", "g", "g_hat", "g_kept", "ema", "momentum_buffer", "exp_avg", "exp_avg_sq"):
        table.set(column, w)
    table.set("step", [torch.zeros(()) for _ in w])
    return table


@triton.jit(do_not_specialize=["n"])
def _probe_kernel(pointer, n, other):
    pass


def specialisations() -> dict[str, list[list[int]]]:
    """Per way of launching, the handles of compiled kernels for calls that Triton tells apart, and for equal ones."""
    aligned, off = torch.zeros(8), torch.zeros(8)[1:]
    double, large = torch.zeros(8, dtype=torch.float64), 2**40
    calls: list[tuple[Any, ...]] = [
        (aligned, 0, None),
        (torch.zeros(8), 7, None),
        (off, 0, None),
        (double, 0, None),
        (aligned, large, None),
        (aligned, 0, aligned),
        (aligned, 0, 1),
        (aligned, 0, 16),
        (aligned, 0, 17),
    ]
    launch = Launcher()
    ways: dict[str, Callable[..., object]] = {
        "plain": lambda *args: _probe_kernel[(1,)](*args),
        "direct": lambda *args: launch(_probe_kernel, 1, *args),
    }
    return {name: [[way(*c), STUB.last.function][1:] for c in calls * 2] for name, way in ways.items()}


def what_others_ask() -> dict[str, Any]:
    """Hooks of profilers, in a direct launch; and what takes part in the front end or in compiling."""
    launch, tensor, names = Launcher(), torch.zeros(8), []
    knobs = triton.knobs.runtime
    result: dict[str, Any] = {}

    def front_end() -> int:
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
            launch(_probe_kernel, 1, tensor, 0, None)
        return run.call_count

    result["first, then direct"] = [front_end(), front_end()]
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    knobs.launch_enter_hook.add(hook)
    knobs.launch_exit_hook.add(hook)
    result["hooked"] = [front_end(), names]
    knobs.launch_enter_hook.remove(hook)
    knobs.launch_exit_hook.remove(hook)
    _probe_kernel.pre_run_hooks.append(lambda *args, **kwargs: None)
    result["pre-run hook"] = front_end()
    _probe_kernel.pre_run_hooks.clear()
    knobs.debug = True
    result["debug"] = [front_end(), front_end()]
    knobs.debug = False
    with mock.patch.object(triton, "__version__", "99.0.0"):
        launch = Launcher()
        result["unknown version"] = [front_end(), front_end()]
    return result


if __name__ == "__main__":
    STUB = install()
    spy = Spy(STUB)
    for dtypes in ((torch.float32,), (torch.float32, torch.bfloat16)):
        table = table_of(*dtypes)
        table.launch = spy  # type: ignore[assignment]
        launch_all(table)
    empty = TensorTable("cpu")
    empty.launch = spy  # type: ignore[assignment]
    for column in ("copy", "g", "g_hat"):
        empty.set(column, [])
    launch_all_of_nothing(empty)
    STUB.record(0)
    found = {"launches": spy.seen, "specialisations": specialisations(), "others": what_others_ask()}
    json.dump({"triton": triton.__version__, **found}, sys.stdout)
