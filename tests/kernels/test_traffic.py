"""The traffic model against the bytes that the kernels load and store."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from benchmarks.lib import traffic
from lesam_kernels import TensorTable, dots, perturb, restore, restore_adamw, restore_sgd, sum_sq
from lesam_kernels.tensor_table import GRAD_COLUMNS, PARAM_COLUMNS
from tests.kernels.cases import BF16, EACH_DTYPE, F32, Make, table_of

if TYPE_CHECKING:  # it needs numpy, which tests on a GPU can do without
    from tests.kernels.memory_spy import MemorySpy

SIZES = (17, 0, 2048 + 21)


class Case:
    """A table with every column, watched."""

    def __init__(self, spy: MemorySpy, make: Make, dtype: torch.dtype, layout: str) -> None:
        columns = (*PARAM_COLUMNS, *GRAD_COLUMNS)
        tensors = {name: [make(n, dtype, layout).abs_() for n in SIZES] for name in columns}
        self.spy, self.tensors, self.num_bytes = spy, tensors, sum(SIZES) * dtype.itemsize
        for name, column in tensors.items():
            spy.watch(name, column)
        self.steps = [torch.zeros(()) for _ in SIZES]

    def table(self, *, without: tuple[str, ...] = ()) -> TensorTable:
        columns = {name: column for name, column in self.tensors.items() if name not in ("w", *without)}
        return table_of(self.tensors["w"], step=self.steps, **columns)

    def check(self, expected: traffic.Traffic, launch: Callable[[], Any]) -> None:
        self.spy.clear()
        launch()
        for counter, tensors in ((self.spy.loaded, expected.reads), (self.spy.stored, expected.writes)):
            assert list(counter.values()) == [self.num_bytes] * tensors  # each once
        assert not self.spy.broken


@pytest.fixture(params=["contiguous", "offset1"])
def case(request: pytest.FixtureRequest, spy: MemorySpy, make: Make) -> Callable[..., Case]:
    return lambda dtype: Case(spy, make, dtype, request.param)


def ones(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def radius(sigma: float = 0.3) -> Tensor:
    return torch.tensor([[sigma, 0.2, 1e-12]], dtype=torch.float64)


@EACH_DTYPE
def test_sum_sq(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    c = case(dtype)
    table = c.table()
    c.check(traffic.sum_sq(), lambda: sum_sq(table, "g"))
    c.check(traffic.dots(), lambda: dots(table, "g", "g_hat"))
    c.check(traffic.sum_sq(metric=True), lambda: sum_sq(table, "g", metric=ones(1, 2)))
    c.check(traffic.sum_sq(ema=True), lambda: sum_sq(table, "g", ema_scale=ones(1)))


@EACH_DTYPE
def test_perturb(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    c = case(dtype)
    table, one = c.table(), ones(dtype=torch.float64)
    c.check(traffic.perturb(), lambda: perturb(table, one, radius()))
    c.check(traffic.perturb(moved=False), lambda: perturb(table, one, radius(0.0)))
    c.check(traffic.perturb(ema=True), lambda: perturb(table, one, radius(), ema_scale=ones(1)))
    c.check(traffic.perturb(), lambda: perturb(table, one, radius(), metric=ones(1, 2)))
    c.check(traffic.perturb(kept=True), lambda: perturb(table, one, radius(), keep=True, found_inf=ones()))
    c.check(traffic.perturb(moved=False, kept=True), lambda: perturb(table, one, radius(0.0), keep=True))


@EACH_DTYPE
def test_restore(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    c = case(dtype)
    table = c.table()
    c.check(traffic.restore(), lambda: restore(table))


@EACH_DTYPE
def test_restore_sgd(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    c = case(dtype)
    table, plain = c.table(), c.table(without=("g_kept", "momentum_buffer"))
    scalars, fine = torch.tensor([[0.1, 0.9, 0.0, 0.01, 1.0, 1.0, 0.5]]), torch.zeros(())
    infinite = torch.tensor(float("inf"), dtype=torch.float64)
    c.check(traffic.restore_sgd(kept=True), lambda: restore_sgd(table, scalars, fine))
    c.check(traffic.restore_sgd(momentum=False), lambda: restore_sgd(plain, scalars, fine))
    c.check(traffic.restore(), lambda: restore_sgd(table, scalars, ones()))
    c.check(traffic.restore(), lambda: restore_sgd(table, scalars, torch.zeros(()), sum_sq=infinite, skipped=ones()))
    factors = dict.fromkeys(
        ("a_factors", "b_factors"), ones(1, dtype=torch.float64)
    )  # as those that clip the gradients
    c.check(traffic.restore_sgd(kept=True), lambda: restore_sgd(table, scalars, fine, **factors))
    table.clear("g_kept")
    c.check(traffic.restore_sgd(), lambda: restore_sgd(table, scalars, fine))


@EACH_DTYPE
def test_restore_adamw(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    c = case(dtype)
    table, fine = c.table(), torch.zeros(())
    scalars = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.01, 1.0, 0.5]], dtype=torch.float64)
    c.check(traffic.restore_adamw(kept=True), lambda: restore_adamw(table, scalars, fine))
    c.check(traffic.restore(), lambda: restore_adamw(table, scalars, ones()))
    factors = dict.fromkeys(("a_factors", "b_factors"), ones(1, dtype=torch.float64))
    c.check(traffic.restore_adamw(kept=True), lambda: restore_adamw(table, scalars, fine, **factors))
    table.clear("g_kept")
    c.check(traffic.restore_adamw(), lambda: restore_adamw(table, scalars, fine))


def test_a_whole_step() -> None:
    """The numbers of the table in the README."""
    assert [4 * t.passes for t in traffic.step("sgd")] == [4, 16, 4, 20]
    assert [4 * t.passes for t in traffic.step("adamw")] == [4, 16, 4, 28]
    assert [4 * t.passes for t in traffic.step("sgd", check_second=False)] == [4, 16, 20]
    assert traffic.passes(traffic.step("sgd", momentum=False, kept=True)) == 1 + 5 + 1 + 4
    assert traffic.passes(traffic.step("adamw", metric=True, ema=True)) == 3 + 5 + 1 + 7
    assert traffic.seconds(traffic.step("sgd"), 250_000, F32, 2.75e12) == pytest.approx(4e-6)
    assert traffic.seconds(traffic.step("sgd"), 250_000, BF16, 2.75e12) == pytest.approx(2e-6)
