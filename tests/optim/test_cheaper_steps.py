"""Cheaper first passes, several perturbations a step and clipping, against the float64 Algorithm 1 changed that way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lesam_dist import LESAM, SAM
from tests.optim.test_algorithm import BASES, CASES, DEVICE, STEPS, Problem
from tests.oracles import Weights, algorithm_1, m_sharpness

SGD = torch.optim.SGD
SIGMA = 0.05
INTERVAL = 3  # ascents at steps 0 and 3 of 6


def part_gradient(problem: Problem, w: Weights, t: int, rows: slice) -> Weights:
    """The gradient of a part of batch t."""
    part = copy.copy(problem)
    part.x, part.y = problem.x[:, rows], problem.y[:, rows]
    return part.gradient(w, t)


def part_closure(problem: Problem, t: int, rows: slice) -> Callable[[], Tensor]:
    part = copy.copy(problem)
    part.x, part.y = problem.x[:, rows], problem.y[:, rows]
    return part.closure(t)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_first_pass_on_a_part_of_the_batch(seed: int, backend: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    options: dict[str, Any] = {"backend": backend, "ascent_fraction": 0.4, "rho_max": None}
    optimizer = LESAM(problem.net.parameters(), SGD, sigma=SIGMA, **options, **kwargs)
    expected, _ = algorithm_1(
        problem.weights(),
        problem.gradient,
        BASES["sgd"][2](**kwargs),  # type: ignore[arg-type]
        steps=STEPS,
        sigma=lambda t: SIGMA,
        first_gradient=lambda w, t: part_gradient(problem, w, t, slice(0, 5)),
    )
    asked = []
    for t in range(STEPS):

        def closure(fraction: float = 1.0, t: int = t) -> Tensor:
            asked.append(fraction)
            return part_closure(problem, t, slice(0, math.ceil(fraction * 11)))()

        optimizer.step(closure)
    assert asked == [0.4, 1.0] * STEPS
    problem.assert_close(expected)


@pytest.mark.parametrize("between", ["skip", "reuse"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_ascent_at_every_third_step(seed: int, backend: str, dtype: torch.dtype, base: str, between: str) -> None:
    problem = Problem(dtype)
    cls, kwargs, oracle = BASES[base]
    options: dict[str, Any] = {"backend": backend, "ascent_interval": INTERVAL, "ascent_between": between}
    optimizer = LESAM(problem.net.parameters(), cls, sigma=SIGMA, rho_max=None, **options, **kwargs)  # type: ignore[arg-type]
    expected, radii = algorithm_1(
        problem.weights(),
        problem.gradient,
        oracle(**kwargs),  # type: ignore[arg-type]
        steps=STEPS,
        sigma=lambda t: SIGMA,
        interval=INTERVAL,
        reuse=between == "reuse",
    )
    calls = 0
    for t in range(STEPS):
        run = problem.closure(t)

        def closure(run: Callable[[], Tensor] = run) -> Tensor:
            nonlocal calls
            calls += 1
            return run()

        optimizer.step(closure)
        assert optimizer.telemetry["rho"].item() == pytest.approx(radii[t], rel=1e-5)
    assert calls == STEPS * (INTERVAL + 1) // INTERVAL
    problem.assert_close(expected)


def test_skipped_ascents_are_the_plain_optimizer_bit_for_bit(seed: int) -> None:
    """Of the reference, whose update is torch's; the kernels' own is held against float64 above."""
    problem = Problem(torch.float32)
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    optimizer = LESAM(problem.net.parameters(), SGD, ascent_interval=STEPS, backend="reference", **kwargs)
    optimizer.step(problem.closure(0))
    twin = copy.deepcopy(problem)
    plain = SGD(twin.net.parameters(), fused=True, **kwargs)
    plain.load_state_dict(copy.deepcopy(optimizer.base_optimizer.state_dict()))
    for t in range(1, STEPS):
        optimizer.step(problem.closure(t))
        plain.zero_grad()
        twin.closure(t)()
        plain.step()
    for p, q in zip(problem.net.parameters(), twin.net.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["torch", "checkpoint"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_reused_gradient_is_resumed_bit_for_bit(seed: int, backend: str, base: str, how: str) -> None:
    """Saved at step 4 of 6, between the ascents at 3 and 6."""
    problem = Problem(torch.float32)
    cls, kwargs, _ = BASES[base]
    options: dict[str, Any] = {"backend": backend, "ascent_interval": INTERVAL, "ascent_between": "reuse"}

    def make(net: nn.Module) -> LESAM:
        return LESAM(net.parameters(), cls, **options, **kwargs)  # type: ignore[arg-type]

    optimizer = make(problem.net)
    for t in range(4):
        optimizer.step(problem.closure(t))
    twin = copy.deepcopy(problem)
    resumed = make(twin.net)
    if how == "torch":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        saved = copy.deepcopy(get_optimizer_state_dict(problem.net, optimizer))
        set_optimizer_state_dict(twin.net, resumed, saved)
    for t in range(4, STEPS):
        optimizer.step(problem.closure(t))
        resumed.step(twin.closure(t))
        assert resumed.telemetry["rho"] > 0
    for p, q in zip(problem.net.parameters(), twin.net.parameters(), strict=True):
        assert torch.equal(p, q)
    cls(twin.net.parameters(), lr=1.0).load_state_dict(resumed.base_optimizer.state_dict())  # type: ignore[call-arg]
    assert not any("ascent_grad" in state for state in resumed.base_optimizer.state.values())


def test_reuse_survives_an_overflow_in_its_ascent(seed: int) -> None:
    """The step is skipped and keeps nothing: those after it reuse what was kept before, at first nothing."""
    problem = Problem(torch.float32)
    options: dict[str, Any] = {"ascent_interval": INTERVAL, "ascent_between": "reuse", "check_second": False}
    optimizer = LESAM(problem.net.parameters(), SGD, lr=0.1, **options)

    def overflowing() -> Tensor:
        loss = problem.closure(0)()
        for p in problem.net.parameters():
            p.grad = torch.full_like(p, torch.inf)
        return loss

    before = problem.weights()
    optimizer.step(overflowing)
    assert optimizer.telemetry["skipped"] == 1
    problem.assert_close(before)
    expected, _ = algorithm_1(
        before, problem.gradient, BASES["sgd"][2](lr=0.1), steps=2, sigma=lambda t: 0.0  # type: ignore[arg-type]
    )  # fmt: skip
    for t in range(2):
        optimizer.step(problem.closure(t))
    assert optimizer.telemetry["skipped"] == 1
    problem.assert_close(expected)
    optimizer.step(problem.closure(2))
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    assert optimizer.telemetry["rho"] > 0
    for t in range(2):
        optimizer.step(problem.closure(t))
    optimizer.step(overflowing)
    assert optimizer.telemetry["skipped"] == 2
    torch.testing.assert_close(optimizer.state_dict()["state"], kept, rtol=0, atol=0)
    optimizer.step(problem.closure(0))
    assert optimizer.telemetry["rho"] > 0


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_a_perturbation_for_each_micro_batch(seed: int, backend: str, dtype: torch.dtype, alpha: float) -> None:
    problem = Problem(dtype)
    parts = [slice(0, 4), slice(4, 8), slice(8, 11)]
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    options: dict[str, Any] = {"backend": backend, "alpha": alpha, "rho_max": None}
    optimizer = LESAM(problem.net.parameters(), SGD, sigma=SIGMA, **options, **kwargs)
    expected = m_sharpness(
        problem.weights(),
        lambda w, t, part: part_gradient(problem, w, t, parts[part]),
        BASES["sgd"][2](**kwargs),  # type: ignore[arg-type]
        steps=STEPS,
        parts=len(parts),
        sigma=SIGMA,
        alpha=alpha,
    )
    for t in range(STEPS):
        optimizer.step([part_closure(problem, t, rows) for rows in parts])
    problem.assert_close(expected)


def test_micro_batches_may_leave_out_parameters(seed: int) -> None:
    """A closure that does not reach a parameter counts as a zero gradient; the first may be one."""
    a, b = (nn.Parameter(torch.randn(3)) for _ in range(2))
    before = a.detach().clone(), b.detach().clone()
    optimizer = SAM([a, b], SGD, rho=0.0, lr=1.0)

    def through(p: Tensor, factor: float) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = factor * p.sum()
            loss.backward()
            return loss

        return run

    optimizer.step([through(a, 1.0), through(b, 2.0), through(a, 3.0), through(a, 4.0)])
    torch.testing.assert_close(a.detach(), before[0] - (1 + 3 + 4) / 4)
    torch.testing.assert_close(b.detach(), before[1] - 2 / 4)


def test_overflow_in_one_micro_batch_skips_the_step(seed: int) -> None:
    for bad in range(4):  # passes 1 and 2 of both
        problem = Problem(torch.float32)
        optimizer = LESAM(problem.net.parameters(), SGD, lr=0.1)
        before, calls = problem.weights(), iter(range(4))

        def closure(calls: Any = calls, bad: int = bad, problem: Problem = problem) -> Tensor:
            loss = problem.closure(0)()
            if next(calls) == bad:
                next(iter(problem.net.parameters())).grad.fill_(torch.nan)  # type: ignore[union-attr]
            return loss

        optimizer.step([closure, closure])
        assert optimizer.telemetry["skipped"] == 1, f"pass {bad}"
        for name, value in problem.weights().items():
            assert (value == before[name]).all(), f"pass {bad}"


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_clipping_acts_on_the_second_gradient(seed: int, backend: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    options: dict[str, Any] = {"backend": backend, "max_grad_norm": 0.3, "check_second": False, "rho_max": None}
    optimizer = LESAM(problem.net.parameters(), SGD, sigma=SIGMA, **options, **kwargs)
    expected, radii = algorithm_1(
        problem.weights(),
        problem.gradient,
        BASES["sgd"][2](**kwargs),  # type: ignore[arg-type]
        steps=STEPS,
        sigma=lambda t: SIGMA,
        max_norm=0.3,
    )
    for t in range(STEPS):
        optimizer.step(problem.closure(t))
        # The first gradient, whose norm makes the radius, is not clipped.
        assert optimizer.telemetry["rho"].item() == pytest.approx(radii[t], rel=1e-5)
        assert optimizer.telemetry["grad_norm"].item() > 0.3
    problem.assert_close(expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_realized_radius(seed: int, backend: str) -> None:
    """Exact in float32; in bfloat16 it is what a look at the weights says, and a small one is rounded away."""
    for dtype, rho in ((torch.float32, 1e-3), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-4)):
        w = nn.Parameter(torch.randn(4096, device=DEVICE).to(dtype))
        optimizer = SAM([w], torch.optim.AdamW, rho=rho, backend=backend, lr=0.1)
        optimizer.measure_rho = True
        before = w.detach().double()
        w.grad = torch.randn_like(w)
        optimizer.first_step()
        moved = (w.detach().double() - before).norm().item()
        assert optimizer.telemetry["realized_rho"].item() == pytest.approx(moved, rel=1e-9, abs=0)
        if dtype == torch.float32:
            assert moved == pytest.approx(rho, rel=1e-4)
        elif rho == 1e-4:
            assert moved < 0.5 * rho or moved > 2 * rho
        optimizer.restore()


@pytest.mark.parametrize("between", ["skip", "reuse"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_single_passes_under_a_loss_scale(seed: int, backend: str, between: str) -> None:
    """As without one; and an overflow in a step of one pass is survived."""
    problem = Problem(torch.float32)
    twin = copy.deepcopy(problem)
    options: dict[str, Any] = {"ascent_interval": INTERVAL, "ascent_between": between, "lr": 0.1}
    scaled = LESAM(problem.net.parameters(), SGD, backend=backend, **options)
    plain = LESAM(twin.net.parameters(), SGD, backend=backend, **options)
    scaler = scaled.grad_scaler = GradScaler(DEVICE, init_scale=1024.0)
    bad = False

    def closure(t: int) -> Tensor:
        x, y = problem.x[t].to(DEVICE, torch.float32), problem.y[t].to(DEVICE)
        loss = nn.functional.cross_entropy(problem.net(x), y)
        scaler.scale(loss * (torch.inf if bad else 1.0)).backward()
        return loss

    for t in range(2):
        scaled.step(lambda t=t: closure(t))
        scaler.update()
        plain.step(twin.closure(t))
    for p, q in zip(problem.net.parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    bad, before = True, problem.weights()
    scaled.step(lambda: closure(2))
    scaler.update()
    assert scaled.telemetry["skipped"] == 1
    assert scaler.get_scale() == 512.0
    assert all((value == before[name]).all() for name, value in problem.weights().items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scope": "node"}, "scope is 'node'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"ascent_fraction": 1.5}, "ascent_fraction is 1.5"),
        ({"ascent_interval": 0}, "ascent_interval is 0"),
        ({"ascent_between": "drop"}, "ascent_between is 'drop'"),
        ({"ascent_interval": 2, "ascent_between": "reuse", "scope": "local"}, "every process has its own"),
        ({"ascent_interval": 2, "ascent_between": "reuse", "alpha": 0.5}, "needs the first gradient of every step"),
        ({"scope": "local", "alpha": 0.5}, "its update uses the first gradient"),
    ],
    ids=str,
)
def test_bad_options(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LESAM([nn.Parameter(torch.ones(2))], SGD, lr=0.1, **kwargs)


@pytest.mark.parametrize("options", [{"scope": "local"}, {"ascent_interval": 2, "ascent_between": "reuse"}], ids=str)
def test_an_alpha_that_comes_later_is_refused_too(seed: int, options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.randn(3))
    optimizer = LESAM([p], SGD, lr=0.1, **options)
    optimizer.param_groups[0]["plus_alpha"] = 0.5
    before = p.detach().clone()

    def closure(sync: bool = True) -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"(needs|uses) the first gradient"):
        optimizer.step(closure)
    assert torch.equal(p, before)
