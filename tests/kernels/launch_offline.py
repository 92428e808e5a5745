"""Take every launcher through Triton's own front end without a GPU, and print how many variants were compiled.

Run by test_ptx.py in a process of its own. The driver is a stand-in: launches compile and are then left out.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from lesam_kernels import TensorTable, dots, perturb, restore, restore_adamw, restore_sgd, sum_sq


class Driver:
    """An H100, as far as compiling goes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def step(table: TensorTable, scalars: Tensor) -> None:
    """All launchers, with scalars that are views at any offset, as a caller may have them."""
    found_inf, metric, row = scalars[0], scalars[1:3].view(1, 2), scalars[3:10].view(1, 7)
    squared = sum_sq(table, "g")
    dots(table, "g", "g_hat")
    radius = torch.rand(4, dtype=torch.float64)[1:].view(1, 3)
    perturb(table, squared, radius)
    perturb(table, squared, radius, metric=metric)
    restore(table)
    restore_sgd(table, row, found_inf)
    restore_adamw(table, row.double(), found_inf)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    launch, kernels = JITFunction.run, set()

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.add(self)
        return launch(self, *args, **{**kwargs, "warmup": True})

    JITFunction.run = compile_only
    CompiledKernel.__getitem__ = lambda self, grid: lambda *args: None  # what was compiled once
    counts = []
    for numel in (1, 16, 5000):
        w = [torch.ones(numel) for _ in range(numel % 7 + 1)]
        steps = [torch.zeros(()) for _ in w]
        table = TensorTable("cpu")
        table.build(w, [0] * len(w))
        for column in ("copy", "g", "g_hat", "momentum_buffer", "exp_avg", "exp_avg_sq"):
            table.set(column, w)
        table.set("step", steps)
        for offset in range(3):
            step(table, torch.rand(16)[offset:])
            counts.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    json.dump(counts, sys.stdout)
