"""restore_adamw against torch.optim.AdamW in float64, on the same gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lesam_kernels import TensorTable, perturb, restore_adamw
from lesam_kernels.launch_config import CHUNK
from tests.kernels.cases import (
    EACH_DTYPE,
    F32,
    Make,
    clones,
    nan_like,
    same_bits,
    scalar,
    table_of,
)

FEW_SIZES = (15, 0, 2069, 2048)

# A step of order lr rounds a few times in float32; steps add up.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
STATE = ("exp_avg", "exp_avg_sq")

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"lr": 0.1},
    "no-decay": {"lr": 0.1, "weight_decay": 0.0},
    "betas": {"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.3},
    "no-momentum": {"lr": 0.1, "betas": (0.0, 0.9)},
    "large-eps": {"lr": 0.1, "eps": 0.5},
    "maximize": {"lr": 0.1, "maximize": True, "weight_decay": 0.1},
}


def row(
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    *,
    a: float = 1.0,
    b: float = 0.0,
) -> list[float]:
    """A param group of torch.optim.AdamW as the kernel takes it."""
    sign = -1.0 if maximize else 1.0
    return [lr, *betas, eps, weight_decay, sign * a, sign * b]


def device_rows(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device=like.device)


def update(table: TensorTable, scalars: Tensor, found_inf: float = 0.0) -> None:
    restore_adamw(table, scalars, torch.tensor(found_inf, device=table.device))


class Run:
    """Parameters in a table, and the same in float64 under torch's optimizer."""

    def __init__(self, make: Make, groups: Sequence[dict[str, Any]], sizes: Sequence[int] = FEW_SIZES) -> None:
        self.make, self.groups, self.sizes = make, groups, sizes
        self.group_of = [i % len(groups) for i in range(len(sizes))]
        self.w = [make(n, F32) for n in sizes]
        self.copies = nan_like(self.w)
        self.state = {name: [torch.zeros_like(t) for t in self.w] for name in STATE}
        self.steps = [torch.zeros((), device=t.device) for t in self.w]
        self.table = table_of(self.w, groups=self.group_of, copy=self.copies, step=self.steps, **self.state)
        self.oracles = [torch.nn.Parameter(t.double()) for t in self.w]
        members = [[p for p, g in zip(self.oracles, self.group_of, strict=True) if g == i] for i in range(len(groups))]
        self.optimizer = AdamW([{"params": params, **group} for params, group in zip(members, groups, strict=True)])

    def gradients(self) -> list[Tensor]:
        return [self.make(n, F32) for n in self.sizes]

    def climb(self, grads: Sequence[Tensor | None]) -> None:
        self.table.set("g", grads)
        radius = torch.tensor([[1.0, 1.0, 0.0]] * len(self.groups), dtype=torch.float64, device=self.w[0].device)
        perturb(self.table, scalar(1.0, self.w[0]), radius)

    def rows(self, **more: Any) -> Tensor:
        return device_rows([row(**group, **more) for group in self.groups], self.w[0])

    def check(self) -> None:
        for i, (w, p) in enumerate(zip(self.w, self.oracles, strict=True)):
            torch.testing.assert_close(w.double(), p.detach(), **CLOSE)
            if p in self.optimizer.state and p.numel():
                for name in STATE:
                    torch.testing.assert_close(self.state[name][i].double(), self.optimizer.state[p][name], **CLOSE)
                assert self.steps[i].item() == self.optimizer.state[p]["step"].item()
        assert self.table.ticket.item() == 0

    def step(self, a: float = 1.0, b: float = 0.0) -> None:
        """Both ways; torch's AdamW gets the mixture of gradients."""
        g, g_hat = self.gradients(), self.gradients()
        self.climb(g)
        self.table.set("g_hat", g_hat)
        if b:
            self.table.set("g_kept", g)
        update(self.table, self.rows(a=a, b=b))
        for p, grad, hat in zip(self.oracles, g, g_hat, strict=True):
            p.grad = a * hat.double() + b * grad.double()
        self.optimizer.step()


@pytest.mark.parametrize("name", OPTIONS)
def test_several_steps(name: str, make: Make) -> None:
    run = Run(make, [OPTIONS[name]])
    for _ in range(4):
        run.step()
        run.check()


def test_groups_of_different_settings(make: Make) -> None:
    """In one launch."""
    run = Run(make, list(OPTIONS.values()), sizes=(2049, 5, 17, 1, 40, 2048, 33, 64, 7, 0, 9, 100))
    for _ in range(3):
        run.step()
        run.check()


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1.3, -0.3)])
def test_mixture_of_both_gradients(a: float, b: float, make: Make) -> None:
    run = Run(make, [OPTIONS["betas"]])
    for _ in range(3):
        run.step(a, b)
        run.check()


@pytest.mark.parametrize("step", [0, 1, 2, 7, 1000, 123_456, 2**24 - 2])
def test_bias_correction(step: int, device: torch.device) -> None:
    """``1 - beta^t`` to float64's rounding, however many steps."""
    w = [torch.zeros(1, device=device)]
    ones, steps = [torch.ones(1, device=device)], [torch.tensor(float(step), device=device)]
    beta1, beta2 = 0.9, 1 - 1e-5
    m, v = clones(ones), clones(ones)
    table = table_of(w, copy=[None], g=[None], g_hat=ones, exp_avg=m, exp_avg_sq=v, step=steps)
    update(table, device_rows([row(lr=1.0, betas=(beta1, beta2), eps=1e-30)], w[0]))
    expected = -math.sqrt(-math.expm1((step + 1) * math.log(beta2))) / -math.expm1((step + 1) * math.log(beta1))
    assert w[0].item() == pytest.approx(expected, rel=3e-7)
    assert steps[0].item() == step + 1


def test_steps_are_each_rows_own(make: Make) -> None:
    """Rows that joined later are corrected for their own number of updates."""
    run = Run(make, [OPTIONS["defaults"]], sizes=(2069, 5, 4100))
    for number in range(3):
        g_hat = run.gradients()
        present = [t if number >= i else None for i, t in enumerate(g_hat)]
        run.climb([None] * 3)
        run.table.set("g_hat", present)
        update(run.table, run.rows())
        for p, grad in zip(run.oracles, present, strict=True):
            p.grad = None if grad is None else grad.double()
        run.optimizer.step()
        run.check()
    assert [s.item() for s in run.steps] == [3.0, 2.0, 1.0]


def test_more_rows_than_one_block_of_steps(device: torch.device) -> None:
    """All of them are counted, in segments of both dtypes."""
    count = 300
    w = [torch.ones(1, device=device, dtype=F32 if i % 16 else torch.bfloat16) for i in range(count)]
    state = {name: [torch.zeros_like(t) for t in w] for name in STATE}
    steps = [torch.tensor(float(i), device=device) for i in range(count)]
    g_hat = [t.clone() if i % 32 in (0, 31) or i == count - 1 else None for i, t in enumerate(w)]
    none = [None] * count
    table = table_of(w, copy=none, g=none, g_hat=g_hat, step=steps, **state)
    update(table, device_rows([row()], w[0]))
    assert [s.item() for s in steps] == [i + (g is not None) for i, g in enumerate(g_hat)]


@pytest.mark.parametrize("found", [1.0, math.nan])
def test_found_inf_only_restores(found: float, make: Make) -> None:
    run = Run(make, [OPTIONS["defaults"]])
    run.step()
    before, state, steps = clones(run.w), {n: clones(run.state[n]) for n in STATE}, [s.item() for s in run.steps]
    run.climb(run.gradients())
    bad = [torch.full_like(w, math.nan) for w in run.w]
    run.table.set("g_hat", bad)
    update(run.table, run.rows(), found)
    assert same_bits(run.w, before)
    assert all(same_bits(run.state[name], state[name]) for name in STATE)
    assert [s.item() for s in run.steps] == steps
    run.step()
    run.check()


def test_rows_without_a_gradient(make: Make) -> None:
    """In either pass: perturbed and not updated, updated and not perturbed, neither, both."""
    run = Run(make, [OPTIONS["defaults"]], sizes=(2069, 2069, 2069, 2069))
    run.step()
    before, m = clones(run.w), clones(run.state["exp_avg"])
    g, g_hat = run.gradients(), run.gradients()
    run.climb([g[0], None, None, g[3]])
    assert not same_bits(run.w[:1], before[:1])
    updated = [None, g_hat[1], None, g_hat[3]]
    run.table.set("g_hat", updated)
    for name in STATE:  # rows that are not updated need no state
        run.table.set(name, [None, run.state[name][1], None, run.state[name][3]])
    update(run.table, run.rows())
    for p, grad in zip(run.oracles, updated, strict=True):
        p.grad = None if grad is None else grad.double()
    run.optimizer.step()
    for i in (0, 2):
        assert same_bits([run.w[i], run.state["exp_avg"][i]], [before[i], m[i]])
    run.check()


@EACH_DTYPE
@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=["aligned", "g-off", "w-off", "all-off"])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "kept"])
def test_every_dtype(kept: bool, layouts: tuple[int, int], dtype: torch.dtype, make: Make) -> None:
    """One step from given state, to one unit in the last place of the parameter's dtype."""
    w_layout, g_layout = (("contiguous", "offset1")[i] for i in layouts)
    w, copies, m, v = ([make(n, dtype, w_layout) for n in FEW_SIZES] for _ in range(4))
    for t in v:
        t.abs_().add_(0.25)
    g_hat, g_kept = ([make(n, dtype, g_layout) for n in FEW_SIZES] for _ in range(2))
    steps = [torch.tensor(4.0, device=t.device) for t in w]
    table = table_of(w, copy=copies, g=g_hat, g_hat=g_hat, exp_avg=m, exp_avg_sq=v, step=steps)
    if kept:
        table.set("g_kept", g_kept)
    settings: dict[str, Any] = {"lr": 0.25, "betas": (0.75, 0.875), "weight_decay": 0.125}
    a, b = (0.75, 0.25) if kept else (1.0, 0.0)
    oracles = [torch.nn.Parameter(t.double()) for t in copies]
    optimizer = AdamW(oracles, **settings)
    for p, hat, first, m_0, v_0 in zip(oracles, g_hat, g_kept, m, v, strict=True):
        p.grad = a * hat.double() + b * first.double()
        optimizer.state[p].update(step=torch.tensor(4.0), exp_avg=m_0.double(), exp_avg_sq=v_0.double())
    update(table, device_rows([row(**settings, a=a, b=b)], w[0]))
    optimizer.step()
    for actual, m_1, v_1, p in zip(w, m, v, oracles, strict=True):
        assert_ulps(m_1, optimizer.state[p]["exp_avg"])
        assert_ulps(v_1, optimizer.state[p]["exp_avg_sq"])
        assert_ulps(actual, p.detach())


def assert_ulps(actual: Tensor, expected: Tensor) -> None:
    """One unit of the dtype (the interpreter truncates bfloat16), and float32's rounding of terms of order 1."""
    ulp = torch.finfo(actual.dtype).eps * expected.abs()
    assert ((actual.double() - expected).abs() <= ulp + 2e-6).all()


@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, make: Make) -> None:
    w, copies, g_hat = ([make(numel, F32)] for _ in range(3))
    state = {name: [torch.zeros_like(w[0])] for name in STATE}
    steps = [torch.zeros((), device=w[0].device)]
    table = table_of(w, copy=copies, g=g_hat, g_hat=g_hat, step=steps, chunk=CHUNK, **state)
    update(table, device_rows([row(lr=0.5, weight_decay=0.0)], w[0]))
    first_step = 0.5 * g_hat[0] / (g_hat[0].abs() + 1e-8)
    torch.testing.assert_close(w[0], copies[0] - first_step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_torch_in_float32_agrees(fused: bool, make: Make) -> None:
    """To rounding, whichever of torch's implementations; the state is torch's own kind."""
    w = [make(2069, F32)]
    theirs = [torch.nn.Parameter(w[0].clone())]
    optimizer = AdamW(theirs, lr=0.1, fused=fused)
    state = {name: [torch.zeros_like(w[0])] for name in STATE}
    steps = [torch.zeros((), device=w[0].device)]
    table = table_of(w, copy=[None], g=[None], step=steps, **state)
    for _ in range(3):
        g_hat = [make(2069, F32)]
        table.set("g_hat", g_hat)
        update(table, device_rows([row()], w[0]))
        theirs[0].grad = g_hat[0]
        optimizer.step()
        torch.testing.assert_close(w[0], theirs[0].detach(), rtol=1e-6, atol=1e-6)
    assert steps[0].dtype == optimizer.state[theirs[0]]["step"].dtype
    assert steps[0].item() == optimizer.state[theirs[0]]["step"].item()


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_update(count: int, device: torch.device) -> None:
    empty = [torch.zeros(0, device=device) for _ in range(count)]
    columns = dict.fromkeys(("copy", "g", "g_hat", *STATE, "step"), empty)
    update(table_of(empty, device=device, **columns), torch.zeros(1, 7, dtype=torch.float64, device=device))


def test_autograd_notices_the_write(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (w * w).sum()  # saves w
    g_hat, m, v, steps = ([torch.zeros(n, device=device)] for n in (3, 3, 3, 1))
    table = table_of([w], copy=[None], g=[None], g_hat=g_hat, exp_avg=m, exp_avg_sq=v, step=steps)
    update(table, device_rows([row()], w))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("column", ["g", "copy", "g_hat", *STATE, "step"])
def test_needs_the_columns_that_it_reads(column: str, device: torch.device) -> None:
    w, steps = [torch.ones(3, device=device)], [torch.zeros((), device=device)]
    columns = dict.fromkeys(("copy", "g", "g_hat", *STATE), w)
    table = table_of(w, step=steps, **columns)
    table.clear(column)
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        update(table, device_rows([row()], w[0]))
    if column in (*STATE, "step"):
        table.set(column, [None])
        with pytest.raises(ValueError, match=f"tensor in column 'g_hat' but none in '{column}'"):
            update(table, device_rows([row()], w[0]))


def test_checks_the_scalars(device: torch.device) -> None:
    w, steps = [torch.ones(3, device=device)], [torch.zeros((), device=device)]
    columns = dict.fromkeys(("copy", "g", "g_hat", *STATE), w)
    table = table_of(w, step=steps, **columns)
    with pytest.raises(ValueError, match=r"scalars has shape \(7,\)"):
        update(table, device_rows([row()], w[0])[0])
    with pytest.raises(TypeError, match=r"scalars is torch\.float32; it must be torch\.float64"):
        update(table, device_rows([row()], w[0]).float())
