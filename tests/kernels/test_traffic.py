"""The traffic model against the bytes that the kernels load and store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, dots, perturb, restore, restore_adamw, restore_sgd, sum_sq, traffic
from tests.kernels.cases import BF16, F16, F32, USED_PAIRS, Make, pair_id, table_of
from tests.kernels.memory_spy import MemorySpy

PARAM_LIKE = ("copy", "momentum_buffer", "exp_avg", "exp_avg_sq")
GRAD_LIKE = ("g", "g_hat", "g_kept", "ema")
SIZES = (17, 0, 2048 + 21)
PAIRS = pytest.mark.parametrize("pair", USED_PAIRS, ids=pair_id)


class Case:
    """A table with every column, watched."""

    def __init__(self, spy: MemorySpy, make: Make, pair: tuple[torch.dtype, torch.dtype], layout: str) -> None:
        tensors = {"w": [make(n, pair[0], layout) for n in SIZES]}
        tensors |= {name: [make(n, pair[0], layout).abs_() for n in SIZES] for name in PARAM_LIKE}
        tensors |= {name: [make(n, pair[1], layout) for n in SIZES] for name in GRAD_LIKE}
        self.spy, self.tensors, self.numel = spy, tensors, sum(SIZES)
        for name, column in tensors.items():
            spy.watch(name, column)
        self.steps = [torch.zeros(()) for _ in SIZES]

    def table(self, *, without: tuple[str, ...] = ()) -> TensorTable:
        columns = {name: column for name, column in self.tensors.items() if name not in ("w", *without)}
        return table_of(self.tensors["w"], step=self.steps, **columns)

    def check(self, expected: traffic.Traffic, launch: Callable[[], Any]) -> None:
        self.spy.clear()
        launch()
        assert self.spy.loaded.total() == expected.reads * self.numel
        assert self.spy.stored.total() == expected.writes * self.numel
        for counter in (self.spy.loaded, self.spy.stored):
            for name, num_bytes in counter.items():
                assert num_bytes == self.numel * self.tensors[name][0].itemsize  # once
        assert not self.spy.broken


@pytest.fixture(params=["contiguous", "offset1"])
def case(request: pytest.FixtureRequest, spy: MemorySpy, make: Make) -> Callable[..., Case]:
    return lambda pair: Case(spy, make, pair, request.param)


def ones(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def radius(sigma: float = 0.3) -> Tensor:
    return torch.tensor([[sigma, 0.2, 1e-12]], dtype=torch.float64)


@PAIRS
def test_sum_sq(pair: tuple[torch.dtype, torch.dtype], case: Callable[..., Case]) -> None:
    c = case(pair)
    table = c.table()
    c.check(traffic.sum_sq(*pair), lambda: sum_sq(table, "g"))
    c.check(traffic.dots(pair[1]), lambda: dots(table, "g", "g_hat"))
    c.check(traffic.sum_sq(*pair, metric=True), lambda: sum_sq(table, "g", metric=ones(1, 2)))
    c.check(traffic.sum_sq(*pair, ema=True), lambda: sum_sq(table, "g", ema_scale=ones(1)))


@PAIRS
def test_perturb(pair: tuple[torch.dtype, torch.dtype], case: Callable[..., Case]) -> None:
    c = case(pair)
    table, one = c.table(), ones(dtype=torch.float64)
    c.check(traffic.perturb(*pair), lambda: perturb(table, one, radius()))
    c.check(traffic.perturb(*pair, moved=False), lambda: perturb(table, one, radius(0.0)))
    c.check(traffic.perturb(*pair, ema=True), lambda: perturb(table, one, radius(), ema_scale=ones(1)))
    c.check(traffic.perturb(*pair), lambda: perturb(table, one, radius(), metric=ones(1, 2)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_restore(dtype: torch.dtype, case: Callable[..., Case]) -> None:
    c = case((dtype, dtype))
    table = c.table()
    c.check(traffic.restore(dtype), lambda: restore(table))


@PAIRS
def test_restore_sgd(pair: tuple[torch.dtype, torch.dtype], case: Callable[..., Case]) -> None:
    c = case(pair)
    table, plain = c.table(), c.table(without=("g_kept", "momentum_buffer"))
    scalars = torch.tensor([[0.1, 0.9, 0.0, 0.01, 1.0, 1.0, 0.5]])
    c.check(traffic.restore_sgd(*pair, kept=True), lambda: restore_sgd(table, scalars))
    c.check(traffic.restore_sgd(*pair, momentum=False), lambda: restore_sgd(plain, scalars))
    c.check(traffic.restore(pair[0]), lambda: restore_sgd(table, scalars, ones()))
    table.clear("g_kept")
    c.check(traffic.restore_sgd(*pair), lambda: restore_sgd(table, scalars))


@PAIRS
def test_restore_adamw(pair: tuple[torch.dtype, torch.dtype], case: Callable[..., Case]) -> None:
    c = case(pair)
    table = c.table()
    scalars = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.01, 1.0, 0.5]], dtype=torch.float64)
    c.check(traffic.restore_adamw(*pair, kept=True), lambda: restore_adamw(table, scalars))
    c.check(traffic.restore(pair[0]), lambda: restore_adamw(table, scalars, ones()))
    table.clear("g_kept")
    c.check(traffic.restore_adamw(*pair), lambda: restore_adamw(table, scalars))


def test_a_whole_step() -> None:
    """The numbers of the table in the README."""
    assert [t.bytes for t in traffic.step("sgd")] == [4, 16, 4, 20]
    assert [t.bytes for t in traffic.step("adamw")] == [4, 16, 4, 28]
    assert [t.bytes for t in traffic.step("sgd", BF16)] == [2, 8, 2, 10]
    assert traffic.step_bytes(10, "sgd") == 440
    assert traffic.step_bytes(10, "sgd", F32, BF16, momentum=False, kept=True) == 10 * (2 + 14 + 2 + 12)
    assert traffic.step_bytes(10, "adamw", metric=True, ema=True) == 10 * (12 + 20 + 4 + 28)
    assert traffic.predicted_seconds(3_000_000, 3e12) == 1e-6
