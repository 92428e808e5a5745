"""Access 16 bytes at a time only where that is allowed, and wherever it is: a GPU would fault, a CPU does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, dots, perturb, restore, restore_adamw, restore_sgd, sum_sq
from tests.kernels.cases import F32, Make, table_of

if TYPE_CHECKING:  # it needs numpy, which tests on a GPU can do without
    from tests.kernels.memory_spy import MemorySpy

NUMEL = 2048 + 21
VECTOR_BYTES = 4 * (2048 + 16)
GRADS = ("g", "g_hat", "g_kept", "ema")
COLUMNS = ("w", "copy", "momentum_buffer", "exp_avg", "exp_avg_sq", *GRADS)


def one(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def radius(sigma: float) -> tuple[Tensor, Tensor]:
    return one(dtype=torch.float64), torch.tensor([[sigma, 0.2, 0.0]], dtype=torch.float64)


LAUNCHES: dict[str, Callable[[TensorTable], Any]] = {
    "sum_sq": lambda table: sum_sq(table, "g"),
    "dots": lambda table: dots(table, "g", "g_hat"),
    "sum_sq-metric-ema": lambda table: sum_sq(table, "g", metric=one(1, 2), ema_scale=one(1)),
    "perturb": lambda table: perturb(table, *radius(0.3)),
    "perturb-metric-ema": lambda table: perturb(table, *radius(0.3), metric=one(1, 2), ema_scale=one(1)),
    "perturb-unmoved": lambda table: perturb(table, *radius(0.0)),
    "restore": restore,
    "restore_sgd": lambda table: restore_sgd(table, one(1, 7) / 2, torch.zeros(())),
    "restore_adamw": lambda table: restore_adamw(table, one(1, 7, dtype=torch.float64) / 2, torch.zeros(())),
}


@pytest.mark.parametrize("unaligned", [None, *COLUMNS])
@pytest.mark.parametrize("name", LAUNCHES)
def test_promises_are_kept_and_made(name: str, unaligned: str | None, spy: MemorySpy, make: Make) -> None:
    """An unaligned gradient costs its own vectors alone; in sums those of the row."""
    columns = {c: [make(NUMEL, F32, "offset1" if c == unaligned else "contiguous").abs_()] for c in COLUMNS}
    for column, tensors in columns.items():
        spy.watch(column, tensors)
    steps = [torch.zeros(())]
    table = table_of(columns["w"], step=steps, **{name: columns[name] for name in columns if name != "w"})
    LAUNCHES[name](table)
    assert not spy.broken
    accessed = spy.loaded | spy.stored
    for column in accessed:
        accesses = (spy.loaded[column] + spy.stored[column]) // (4 * NUMEL)
        assert spy.loaded[column] + spy.stored[column] == accesses * 4 * NUMEL
        hit = unaligned is not None and unaligned in accessed
        alone = hit and unaligned in GRADS and not name.startswith(("sum_sq", "dots"))
        scalar = column in GRADS if alone else hit
        assert spy.promised[column] == (0 if scalar else accesses * VECTOR_BYTES)
