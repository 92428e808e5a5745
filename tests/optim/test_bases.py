"""Base optimizers of every make: torch's fused ones where they leave state unwritten, and ones from elsewhere."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lesam_dist import SAM
from tests.optim.nets import DEVICE, make_net

BACKENDS = ["reference", "triton"]
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True, "weight_decay": 0.01},
    "dampening": {"dampening": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.01},
}


class SignDescent(Optimizer):
    """A base from elsewhere: none of torch's own keys in its groups, state of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                total = self.state[p].setdefault("total", torch.zeros_like(p))
                total += p.grad
                p.sub_(total.sign(), alpha=group["lr"])


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch leaves unwritten is memory that others used: full of large numbers."""
    empty_like = torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(float("nan") if torch.rand(()) < 0.5 else 1e30) if tensor.is_floating_point() else tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", poisoned)
        yield


def oracle(weights: list[Tensor], grads: list[list[Tensor | None]], **kwargs: Any) -> list[Tensor]:
    """torch's SGD, one tensor at a time, in float64; the steps with a non-finite gradient left out."""
    params = [nn.Parameter(w.detach().double()) for w in weights]
    plain = SGD(params, fused=False, foreach=False, **kwargs)
    for step in grads:
        if all(bool(g.isfinite().all()) for g in step if g is not None):
            for p, g in zip(params, step, strict=True):
                p.grad = None if g is None else g.double()
            plain.step()
    return [p.detach() for p in params]


def apply(optimizer: SAM, params: list[nn.Parameter], grads: list[list[Tensor | None]], bad: int = 0) -> None:
    """Steps by given gradients in both passes; those that are not finite only from pass ``bad`` on."""
    for step in grads:
        for number in range(2):
            for p, g in zip(params, step, strict=True):
                skip = g is not None and not g.isfinite().all() and number < bad
                p.grad = None if g is None else torch.ones_like(g) if skip else g.clone()
            (optimizer.second_step if number else optimizer.first_step)(zero_grad=True)


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_an_overflow_in_the_first_steps_leaves_no_trace(
    seed: int, garbage: None, backend: str, bad_pass: int, kind: str
) -> None:
    """torch's fused SGD allocates the momentum, skips, and later uses what the memory held."""
    kwargs = MOMENTUM | SGDS[kind]
    params = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (7, 300)]
    before = [p.detach().clone() for p in params]
    grads: list[list[Tensor | None]] = [[torch.randn_like(p) for p in params] for _ in range(5)]
    for step in grads[:2]:
        step[1][3] = float("inf")  # type: ignore[index]
    optimizer = SAM(params, SGD, backend=backend, **kwargs)  # type: ignore[arg-type]
    apply(optimizer, params, grads, bad_pass)
    assert optimizer.telemetry["skipped"].item() == 2
    for p, expected in zip(params, oracle(before, grads, **kwargs), strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_gradients_may_come_late(seed: int, garbage: None, backend: str, kind: str) -> None:
    """Layers that are unfrozen, heads that alternate, blocks that are skipped; one such step overflows."""
    kwargs = MOMENTUM | SGDS[kind]
    params = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (7, 300, 20)]
    before = [p.detach().clone() for p in params]
    present = [(1, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)]
    grads = [[torch.randn_like(p) if there else None for p, there in zip(params, row, strict=True)] for row in present]
    grads[3][2].fill_(float("nan"))  # type: ignore[union-attr]
    optimizer = SAM(params, SGD, backend=backend, **kwargs)  # type: ignore[arg-type]
    apply(optimizer, params, grads)
    for p, expected in zip(params, oracle(before, grads, **kwargs), strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_from_elsewhere_makes_its_own_step(seed: int, backend: str) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    optimizer = SAM(net.parameters(), SignDescent, rho=0.0, lr=0.1, backend=backend)  # type: ignore[arg-type]
    plain = SignDescent(twin.parameters(), lr=0.1)
    for _ in range(3):
        grads: list[list[Tensor | None]] = [[torch.randn_like(p) for p in net.parameters()]]
        apply(optimizer, list(net.parameters()), grads)
        for p, g in zip(twin.parameters(), grads[0], strict=True):
            p.grad = g
        plain.step()
        optimizer.push_scalars()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    states = zip(optimizer.state.values(), plain.state.values(), strict=True)
    assert all(torch.equal(mine["total"], its["total"]) for mine, its in states)


def test_a_base_that_only_says_it_is_fused_is_asked_before_it_steps(seed: int) -> None:
    """Only torch's own kernels read the flag on the device."""

    class Fused(SignDescent):
        def __init__(self, params: Any, lr: float) -> None:
            Optimizer.__init__(self, params, {"lr": lr, "fused": True})

    w = nn.Parameter(torch.randn(5))
    before = w.detach().clone()
    apply(SAM([w], functools.partial(Fused, lr=0.1)), [w], [[torch.full((5,), float("inf"))]])
    assert torch.equal(w, before)
