"""restore_sgd against torch.optim.SGD in float64, on the same gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lesam_kernels import TensorTable, perturb, restore_sgd
from lesam_kernels.launch_config import CHUNK
from tests.kernels.cases import (
    DTYPES,
    EACH_DTYPE,
    F32,
    SIZES,
    Make,
    clones,
    nan_like,
    same_bits,
    scalar,
    table_of,
)

FEW_SIZES = (15, 0, 2069, 2048)

# A step of order 1 rounds a few times in float32; steps add up.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    "all": {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True, "maximize": True},
}


def row(
    lr: float = 0.1,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    *,
    a: float = 1.0,
    b: float = 0.0,
) -> list[float]:
    """A param group of torch.optim.SGD as the kernel takes it."""
    sign = -1.0 if maximize else 1.0
    return [lr, momentum, dampening, weight_decay, float(nesterov), sign * a, sign * b]


def device_rows(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=F32, device=like.device)


def update(table: TensorTable, scalars: Tensor, found_inf: float = 0.0) -> None:
    restore_sgd(table, scalars, torch.tensor(found_inf, device=table.device))


class Run:
    """Parameters in a table, and the same in float64 under torch's optimizer."""

    def __init__(self, make: Make, groups: Sequence[dict[str, Any]], sizes: Sequence[int] = FEW_SIZES) -> None:
        self.make, self.groups, self.sizes = make, groups, sizes
        self.group_of = [i % len(groups) for i in range(len(sizes))]
        self.w = [make(n, F32) for n in sizes]
        self.copies, self.bufs = nan_like(self.w), [torch.zeros_like(t) for t in self.w]
        self.table = table_of(self.w, groups=self.group_of, copy=self.copies)
        has_buf = [bool(groups[group].get("momentum")) for group in self.group_of]
        self.table.set("momentum_buffer", [t if has else None for t, has in zip(self.bufs, has_buf, strict=True)])
        self.oracles = [torch.nn.Parameter(t.double()) for t in self.w]
        members = [[p for p, g in zip(self.oracles, self.group_of, strict=True) if g == i] for i in range(len(groups))]
        self.optimizer = SGD(
            [{"params": params, **group} for params, group in zip(members, groups, strict=True)], lr=0.1
        )
        for p, group in zip(self.oracles, self.group_of, strict=True):
            if groups[group].get("dampening"):  # torch leaves it out of a step that finds no buffer
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def gradients(self) -> list[Tensor]:
        return [self.make(n, F32) for n in self.sizes]

    def climb(self, grads: Sequence[Tensor | None]) -> None:
        self.table.set("g", grads)
        radius = torch.tensor([[1.0, 1.0, 0.0]] * len(self.groups), dtype=torch.float64, device=self.w[0].device)
        perturb(self.table, scalar(1.0, self.w[0]), radius)

    def rows(self, **more: Any) -> Tensor:
        return device_rows([row(**{"lr": 0.1, **group, **more}) for group in self.groups], self.w[0])

    def check(self, **more: Any) -> None:
        for w, expected in zip(self.w, self.oracles, strict=True):
            torch.testing.assert_close(w.double(), expected.detach(), **CLOSE)
        for buf, p in zip(self.bufs, self.oracles, strict=True):
            expected_buf = self.optimizer.state[p].get("momentum_buffer")
            if expected_buf is not None:
                torch.testing.assert_close(buf.double(), expected_buf, **CLOSE)

    def step(self, **more: Any) -> None:
        """Both ways; torch's SGD gets the mixture of gradients."""
        g, g_hat = self.gradients(), self.gradients()
        self.climb(g)
        self.table.set("g_hat", g_hat)
        if more.get("b"):
            self.table.set("g_kept", g)
        update(self.table, self.rows(**more))
        for p, grad, hat in zip(self.oracles, g, g_hat, strict=True):
            p.grad = more.get("a", 1.0) * hat.double() + more.get("b", 0.0) * grad.double()
        self.optimizer.step()


@pytest.mark.parametrize("name", OPTIONS)
def test_several_steps(name: str, make: Make) -> None:
    run = Run(make, [OPTIONS[name]])
    for _ in range(4):
        run.step()
        run.check()


def test_groups_of_different_settings(make: Make) -> None:
    """In one launch, with buffers for those that have momentum."""
    groups = [{"lr": 0.1 * (i + 1), **options} for i, options in enumerate(OPTIONS.values())]
    run = Run(make, groups, sizes=(2049, 5, 17, 1, 40, 0, 2048, 33, 64, 7, 5, 9, 100, 3))
    for _ in range(3):
        run.step()
        run.check()


def test_scheduled_scalars(make: Make) -> None:
    run = Run(make, [{"momentum": 0.9}])
    for number in range(4):
        run.groups = [{"momentum": 0.9 - 0.1 * number, "lr": 0.1 / (number + 1)}]
        run.optimizer.param_groups[0].update(run.groups[0])
        run.step()
        run.check()


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.3, -0.3), (0.0, 1.0)])
def test_mixture_of_both_gradients(a: float, b: float, make: Make) -> None:
    run = Run(make, [OPTIONS["all"]])
    for _ in range(3):
        run.step(a=a, b=b)
        run.check()


def test_no_kept_gradient_counts_as_zero(make: Make) -> None:
    """A row without one, next to rows that have theirs; and all rows where the column is not set."""
    w = [make(n, F32) for n in (2049, 5)]
    g_hat, kept = ([make(n, F32) for n in (2049, 5)] for _ in range(2))
    before = clones(w)
    table = table_of(w, g=[None, None], copy=[None, None], g_hat=g_hat, g_kept=[None, kept[1]])
    update(table, device_rows([row(a=1.0, b=2.0)], w[0]))
    torch.testing.assert_close(w[0], before[0] - 0.1 * g_hat[0])
    torch.testing.assert_close(w[1], before[1] - 0.1 * (g_hat[1] + 2 * kept[1]))
    table.clear("g_kept")
    before = clones(w)
    update(table, device_rows([row(a=1.0, b=math.nan)], w[0]))
    torch.testing.assert_close(w, [x - 0.1 * g for x, g in zip(before, g_hat, strict=True)])


def test_rows_without_a_buffer_have_no_momentum(make: Make) -> None:
    """Whatever their group says, and next to rows that have one."""
    w, g_hat, bufs = ([make(n, F32) for n in (2069, 33)] for _ in range(3))
    settings = {"momentum": 0.5, "dampening": 0.5, "nesterov": True}
    expected = [w[0] - 0.1 * g_hat[0], w[1] - 0.1 * (g_hat[1] + 0.5 * (0.5 * bufs[1] + 0.5 * g_hat[1]))]
    table = table_of(w, g=[None, None], copy=[None, None], g_hat=g_hat, momentum_buffer=[None, bufs[1]])
    update(table, device_rows([row(**settings)], w[0]))
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("found", [1.0, math.nan])
def test_found_inf_only_restores(found: float, make: Make) -> None:
    """Also in the first step, and the next one is torch's first then."""
    run = Run(make, [OPTIONS["momentum"]])
    before, bufs = clones(run.w), clones(run.bufs)
    run.climb(run.gradients())
    bad = [torch.full_like(w, math.nan) for w in run.w]
    run.table.set("g_hat", bad)
    update(run.table, run.rows(), found)
    assert same_bits(run.w, before)
    assert same_bits(run.bufs, bufs)
    for _ in range(2):
        run.step()
        run.check()


def test_rows_without_a_gradient(make: Make) -> None:
    """In either pass: perturbed and not updated, updated and not perturbed, neither, both."""
    run = Run(make, [OPTIONS["nesterov"]], sizes=(2069, 2069, 2069, 2069))
    run.step()
    for _ in range(2):
        before, bufs = clones(run.w), clones(run.bufs)
        g, g_hat = run.gradients(), run.gradients()
        run.climb([g[0], None, None, g[3]])
        assert not same_bits(run.w[:1], before[:1])
        updated = [None, g_hat[1], None, g_hat[3]]
        run.table.set("g_hat", updated)
        update(run.table, run.rows())
        for p, grad in zip(run.oracles, updated, strict=True):
            p.grad = None if grad is None else grad.double()
        run.optimizer.step()
        for i in (0, 2):
            assert same_bits([run.w[i], run.bufs[i]], [before[i], bufs[i]])
        run.check()


@EACH_DTYPE
@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["aligned", "g-off", "w-off", "all-off"])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "kept"])
def test_every_dtype(kept: bool, layouts: tuple[int, int], dtype: torch.dtype, make: Make) -> None:
    """One step from given buffers, to one unit in the last place of the parameter's dtype."""
    w_layout, g_layout = (("contiguous", "offset1")[i] for i in layouts)
    w, copies, bufs = ([make(n, dtype, w_layout) for n in FEW_SIZES] for _ in range(3))
    g_hat, g_kept = ([make(n, dtype, g_layout) for n in FEW_SIZES] for _ in range(2))
    table = table_of(w, copy=copies, g=g_hat, g_hat=g_hat, momentum_buffer=bufs)
    if kept:
        table.set("g_kept", g_kept)
    settings = {"lr": 0.25, "momentum": 0.875, "dampening": 0.5, "weight_decay": 0.125}
    a, b = (0.75, 0.25) if kept else (1.0, 0.0)
    oracles = [torch.nn.Parameter(t.double()) for t in copies]
    optimizer = SGD(oracles, **settings)
    for p, hat, first, buf in zip(oracles, g_hat, g_kept, bufs, strict=True):
        p.grad = a * hat.double() + b * first.double()
        optimizer.state[p]["momentum_buffer"] = buf.double()
    update(table, device_rows([row(**settings, a=a, b=b)], w[0]))
    optimizer.step()
    for actual, buf, p in zip(w, bufs, oracles, strict=True):
        assert_ulps(buf, optimizer.state[p]["momentum_buffer"])
        assert_ulps(actual, p.detach())


def assert_ulps(actual: Tensor, expected: Tensor) -> None:
    """One unit of the dtype (the interpreter truncates bfloat16), and float32's rounding of terms of order 1."""
    ulp = torch.finfo(actual.dtype).eps * expected.abs()
    assert ((actual.double() - expected).abs() <= ulp + 2e-6).all()


@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, make: Make) -> None:
    w, copies, g_hat = ([make(numel, F32)] for _ in range(3))
    table = table_of(w, copy=copies, g=g_hat, g_hat=g_hat, chunk=CHUNK)
    update(table, device_rows([row()], w[0]))
    torch.testing.assert_close(w[0], copies[0] - 0.1 * g_hat[0])


def test_long_list_of_mixed_dtypes(make: Make, rng: torch.Generator) -> None:
    """Also channels_last and empty tensors; every row is updated once."""
    sizes = torch.randint(0, 2500, (60,), generator=rng).tolist()
    w, g_hat = ([make(n, DTYPES[i % 3]) for i, n in enumerate(sizes)] for _ in range(2))
    for tensors in (w, g_hat):
        tensors.append(make((2, 3, 4, 5), F32, "channels_last"))
    before = clones(w)
    table = table_of(w, copy=[None] * 61, g=[None] * 61, g_hat=g_hat)
    update(table, device_rows([row(lr=0.5)], w[0]))
    for actual, old, g in zip(w, before, g_hat, strict=True):
        assert_ulps(actual, old.double() - 0.5 * g.double())


@pytest.mark.parametrize("fused", [False, True])
def test_torch_in_float32_agrees(fused: bool, make: Make) -> None:
    """To rounding, whichever of torch's implementations."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
    w = [make(2069, F32)]
    bufs, theirs = [torch.zeros_like(w[0])], [torch.nn.Parameter(w[0].clone())]
    optimizer = SGD(theirs, **settings, fused=fused)
    table = table_of(w, copy=[None], g=[None], momentum_buffer=bufs)
    for _ in range(3):
        g_hat = [make(2069, F32)]
        table.set("g_hat", g_hat)
        update(table, device_rows([row(**settings)], w[0]))
        theirs[0].grad = g_hat[0]
        optimizer.step()
        torch.testing.assert_close(w[0], theirs[0].detach(), rtol=1e-6, atol=1e-6)


def test_same_bits_every_time(make: Make) -> None:
    w, copies, bufs, g_hat = ([make(n, F32) for n in SIZES] for _ in range(4))
    results = []
    for layout in ("contiguous", "contiguous", "offset1"):
        own = [torch.cat([t[:1], t])[1:] if layout == "offset1" and t.numel() else t.clone() for t in w]
        own_bufs = clones(bufs)
        table = table_of(own, copy=copies, g=g_hat, g_hat=g_hat, momentum_buffer=own_bufs)
        update(table, device_rows([row(momentum=0.9, weight_decay=0.1)], w[0]))
        results.append((own, own_bufs))
    for own, own_bufs in results[1:]:
        assert same_bits(own, results[0][0])
        assert same_bits(own_bufs, results[0][1])


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_update(count: int, device: torch.device) -> None:
    empty = [torch.zeros(0, device=device) for _ in range(count)]
    table = table_of(empty, copy=empty, g=empty, g_hat=empty, device=device)
    update(table, torch.zeros(1, 7, device=device))


def test_autograd_notices_the_write(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (w * w).sum()  # saves w
    g_hat = [torch.zeros(3, device=device)]
    update(table_of([w], copy=[None], g=[None], g_hat=g_hat), device_rows([row()], w))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("column", ["g", "copy", "g_hat"])
def test_needs_the_columns_that_it_reads(column: str, device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table = table_of(w, copy=w, g=w, g_hat=w)
    table.clear(column)
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        update(table, device_rows([row()], w[0]))


def test_checks_the_scalars(device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table = table_of(w, groups=[1], copy=w, g=w, g_hat=w)
    rows = device_rows([row(), row()], w[0])
    with pytest.raises(ValueError, match=r"scalars has shape \(1, 7\) .* of shape \(2, 7\)"):
        update(table, rows[:1])
    with pytest.raises(TypeError, match=r"scalars is torch\.float64"):
        update(table, rows.double())
    with pytest.raises(TypeError, match=r"found_inf is torch\.bool"):
        restore_sgd(table, rows, torch.tensor(True, device=device))
