"""Norms taken while backward goes on: the numbers of the plain step, no sum left in it, and what makes it sum anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

from lesam_dist import LESAM
from lesam_dist.optim.engine import early_sums
from lesam_dist.train.passes import BatchPasses
from tests.methods import CASES
from tests.optim.early_norms import (
    BACKENDS,
    LAYERS,
    Launches,
    accumulated,
    assert_close,
    batch,
    closure_of,
    make_net,
    pair,
    unused,
)
from tests.optim.nets import DEVICE


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups as a small net can have."""
    monkeypatch.setattr(early_sums, "LEAST_BYTES", 1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_every_method_takes_the_step_that_it_takes_without(seed: int, name: str) -> None:
    case = CASES[name]
    both = pair(seed, case.method, backend="reference", **case.kwargs)
    for step in range(4):
        for net, optimizer in both:
            optimizer.step(closure_of(net, seed + step))
        assert_close(both)


@pytest.mark.parametrize("name", CASES)
def test_every_method_takes_the_same_step_with_a_loss_scale(seed: int, name: str) -> None:
    """Whether it works with scaled gradients, whose sums were taken, or takes the scale off first."""
    case = CASES[name]
    both = pair(seed, case.method, backend="reference", **case.kwargs)
    (net, plain), (twin, early) = both
    scaler = early.grad_scaler = GradScaler(DEVICE, init_scale=2.0**12)
    for step in range(4):
        plain.step(closure_of(net, seed + step))
        early.step(closure_of(twin, seed + step, scaler))
        scaler.update()
        assert_close(both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_scaled_gradients_are_taken_in_backward(launches: Launches, seed: int, backend: str) -> None:
    """And tell of an overflow in either pass."""
    _, (net, optimizer) = pair(seed, LESAM, torch.float32, backend=backend)
    scaler = optimizer.grad_scaler = GradScaler(DEVICE, init_scale=2.0**12)
    optimizer.step(closure_of(net, seed, scaler))
    scaler.update()
    launches.take()
    optimizer.step(closure_of(net, seed + 1, scaler))
    scaler.update()
    assert launches.take() == (2 * LAYERS, 0, 0)
    before = [p.clone() for p in net.parameters()]
    for bad_pass in range(2):
        passes = [closure_of(net, seed, scaler) for _ in range(2)]
        passes[bad_pass].images *= torch.inf
        calls = iter(passes)
        optimizer.step(lambda calls=calls: next(calls)())
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
        assert scaler.get_scale() == 2.0 ** (11 - bad_pass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sum_is_left_in_the_step(launches: Launches, seed: int, backend: str) -> None:
    _, (net, optimizer) = pair(seed, LESAM, torch.float32, backend=backend)
    optimizer.step(closure_of(net, seed))
    assert launches.take() == (LAYERS, LAYERS, 0)  # the first gradient came before the parameters were known
    for step in range(1, 4):
        optimizer.step(closure_of(net, seed + step))
        assert launches.take() == (2 * LAYERS, 0, 0)


def test_the_last_of_several_backward_passes_counts(launches: Launches, seed: int) -> None:
    both = pair(seed, LESAM)
    for step in range(3):
        for net, optimizer in both:
            launches.take()
            optimizer.step(micro_batches(net, seed + step))
        assert_close(both)
    assert launches.take() == (2 * 3 * LAYERS, 0, 0)  # of two passes through three parts of the batch


OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.1},
    "unchecked": {"max_grad_norm": 0.1, "check_second": False},
    "static": {"static_grads": True},
    "skip": {"ascent_interval": 2},
    "reuse": {"ascent_interval": 2, "ascent_between": "reuse"},
    "fraction": {"ascent_fraction": 0.5},
    "plus": {"alpha": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(launches: Launches, seed: int, options: dict[str, Any]) -> None:
    both = pair(seed, LESAM, **options)
    for step in range(4):
        for net, optimizer in both:
            launches.take()
            optimizer.step(closure_of(net, seed + step))
        again = step % 2 == 1 and "ascent_between" in options  # along what was kept, not along a gradient
        assert launches.take()[1:] == (0, int(again)) or step == 0
        assert_close(both)


def micro_batches(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    x, y = batch(seed, torch.float64)
    return BatchPasses(net, nn.CrossEntropyLoss(), x, y, micro_batches=3)


def changed(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    """A closure that changes gradients after its backward: in place, by others, and by none."""
    passes = closure_of(net, seed)

    def closure() -> Tensor:
        loss = passes()
        first, second, third = (net[i].weight for i in (0, 2, 4))
        first.grad.mul_(3.0)
        second.grad = second.grad * 0.5
        third.grad = None
        return loss

    return closure


@pytest.mark.parametrize("make", [unused, accumulated, micro_batches, changed])
def test_sums_are_of_the_gradients_that_the_step_sees(seed: int, make: Any) -> None:
    both = pair(seed, LESAM)
    for step in range(4):
        for net, optimizer in both:
            optimizer.step(make(net, seed + step))
        assert_close(both)


def test_groups_that_are_not_perturbed_count_in_the_second_norm_alone(launches: Launches, seed: int) -> None:
    torch.manual_seed(seed)
    nets = [make_net(torch.float64)]
    nets.append(copy.deepcopy(nets[0]))
    both = []
    for net, early in zip(nets, (False, True), strict=True):
        net[2].bias.requires_grad_(False)
        groups = [
            {"params": net[0].parameters(), "perturb": False},
            {"params": [*net[2].parameters(), *net[4].parameters()]},
        ]
        both.append((net, LESAM(groups, SGD, lr=0.1, max_grad_norm=0.01, norm_in_backward=early)))
    for step in range(3):
        for net, optimizer in both:
            launches.take()
            optimizer.step(closure_of(net, seed + step))
        assert_close(both)
    assert launches.take() == (2 * (LAYERS + 1), 0, 0)  # two of those that are not perturbed, two of the others
    for net, optimizer in both:
        net[0].bias.requires_grad_(False)
        net[2].bias.requires_grad_(True)  # which has no hook
        optimizer.step(closure_of(net, seed))
    assert_close(both)


def test_sequence_of_closures(seed: int) -> None:
    both = pair(seed, LESAM)
    for step in range(3):
        for net, optimizer in both:
            optimizer.step([closure_of(net, seed + step), unused(net, seed + step)])
        assert_close(both)


@pytest.mark.parametrize("bad", [0, 1])
def test_gradient_that_is_not_finite_skips(seed: int, bad: int) -> None:
    _, (net, optimizer) = pair(seed, LESAM)
    optimizer.step(closure_of(net, seed))
    before = [p.detach().clone() for p in net.parameters()]
    calls = iter(range(2))
    x, y = batch(seed, torch.float64)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y) * (float("inf") if next(calls) == bad else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.telemetry["skipped"] == 1
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
