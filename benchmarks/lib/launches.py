"""The kernels of one step, each as a call of its own, over the tensors of a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lesam_kernels import TensorTable, perturb, restore_adamw, restore_sgd, sum_sq
from lesam_kernels.launch_config import CHUNK
from lib import traffic
from lib.problem import Problem
from lib.report import Result, number, percentiles, table
from lib.timing import CpuClock, no_collection
from lib.traffic import Base, Traffic

_WARM_UP = 3


class Launch(NamedTuple):
    """A kernel as a step calls it, and what it should move."""

    name: str
    traffic: Traffic
    call: Callable[[], object]


class Launches:
    """The four launches of a default step, with the check of the second gradient.

    Args:
        problem: weights, which are cloned, and both gradients.
        base: the base optimizer.
        chunk, walk_back: see `TensorTable`.
    """

    def __init__(self, problem: Problem, base: Base, *, chunk: int = CHUNK, walk_back: bool = True) -> None:
        self.weights, hyper = problem.parameters(), problem.hyper
        device = self.weights[0].device
        self.state = {
            name: [torch.zeros_like(w) for w in self.weights]
            for name in (("momentum_buffer",) if base == "sgd" else ("exp_avg", "exp_avg_sq"))
        }
        self._copies = [torch.empty_like(w) for w in self.weights]
        self._steps = [torch.zeros((), device=device) for _ in self.weights]
        self.table = TensorTable(device, chunk=chunk, walk_back=walk_back)
        self.table.build(self.weights, [0] * len(self.weights))
        columns = {"copy": self._copies, "g": problem.first, "g_hat": problem.second, "step": self._steps, **self.state}
        for name, tensors in columns.items():
            self.table.set(name, tensors)
        self._radius = torch.tensor([[hyper.sigma, hyper.rho_max, hyper.eps]], dtype=torch.float64, device=device)
        mixture = (1.0, 0.0)
        if base == "sgd":
            row: tuple[float, ...] = (hyper.lr, hyper.momentum, 0.0, hyper.weight_decay, 0.0, *mixture)
            self._update, dtype = restore_sgd, torch.float32
        else:
            row = (hyper.lr, *hyper.betas, hyper.adam_eps, hyper.weight_decay, *mixture)
            self._update, dtype = restore_adamw, torch.float64
        self._scalars = torch.tensor([row], dtype=dtype, device=device)
        self._found_inf, self._skipped = (torch.zeros((), device=device) for _ in range(2))
        self._sums: dict[str, Tensor] = {}
        calls = (self._sum("g"), self._perturb, self._sum("g_hat"), self._restore)
        names = ("sum_sq g", "perturb", "sum_sq g_hat", f"restore_{base}")
        kernels = traffic.step(base)
        self.ascent, self.descent = (
            [Launch(*launch) for launch in list(zip(names, kernels, calls, strict=True))[half]]
            for half in (slice(0, 2), slice(2, 4))
        )

    def _sum(self, column: str) -> Callable[[], object]:
        def call() -> None:
            self._sums[column] = sum_sq(self.table, column)

        return call

    def _perturb(self) -> None:
        perturb(self.table, self._sums["g"], self._radius, found_inf=self._found_inf)

    def _restore(self) -> None:
        self._update(self.table, self._scalars, self._found_inf, sum_sq=self._sums["g_hat"], skipped=self._skipped)


def time_launches(variants: dict[str, Launches], clock: CpuClock, repeats: int) -> dict[str, list[Result]]:
    """Percentiles of each kernel in its place within a step, by variant; variants take turns.

    The caches are flushed before each half of a step, since a forward and a backward pass lie there, and not between
    its two kernels, where the second may find what the first has read.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    with no_collection():
        for repeat in range(_WARM_UP + repeats):
            for name, launches in variants.items():
                for half in (launches.ascent, launches.descent):
                    seconds = clock.each_device_seconds([launch.call for launch in half])
                    if repeat >= _WARM_UP:
                        for launch, value in zip(half, seconds, strict=True):
                            samples[name].setdefault(launch.name, []).append(value)
    return {name: _results(launches, samples[name]) for name, launches in variants.items()}


def _results(launches: Launches, samples: dict[str, list[float]]) -> list[Result]:
    num_bytes = sum(w.nbytes for w in launches.weights)
    return [
        {
            "kernel": launch.name,
            "bytes": launch.traffic.passes * num_bytes,
            "seconds": percentiles(samples[launch.name]),
        }
        for launch in (*launches.ascent, *launches.descent)
    ]


def as_table(results: list[Result], copy: float | None) -> str:
    """Markdown: of each kernel what it took, and what it would take at the copy's bandwidth, in bytes per second."""
    header = ["kernel", "ms (p20-p80)", "MB", "GB/s", "of copy", "predicted ms", "over predicted"]
    rows = []
    for r in [*results, _sum_of(results)]:
        p20, p50, p80 = (r["seconds"][p] for p in ("p20", "p50", "p80"))
        predicted = r["bytes"] / copy if copy else None
        row = [r["kernel"], f"{number(p50, 4, 1e3)} ({number(p20, 4, 1e3)}-{number(p80, 4, 1e3)})"]
        row += [number(r["bytes"], 1, 1e-6), number(r["bytes"] / p50, 0, 1e-9)]
        row += [number(predicted and predicted / p50, 0, 100, " %"), number(predicted, 4, 1e3)]
        rows.append([*row, number(predicted and p50 / predicted, 2)])
    return table(header, rows)


def _sum_of(results: list[Result]) -> Result:
    """All kernels together; percentiles add up to bounds of the sum's."""
    seconds = {p: sum(r["seconds"][p] for r in results) for p in ("p20", "p50", "p80")}
    return {"kernel": "all", "bytes": sum(r["bytes"] for r in results), "seconds": seconds}
