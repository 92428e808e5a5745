"""`SimpleLESAM`, the method in plain torch, and `LESAM`: two implementations that must agree."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM
from lesam_dist.optim import simple
from lesam_dist.optim.simple import SimpleLESAM
from tests.optim.nets import DEVICE

STEPS = 6
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
}
# Roundings over STEPS steps of two passes and an update; AdamW divides by sqrt(v), which makes small gradients' larger.
CLOSE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}
CASES = [("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)]


def random_net(dtype: torch.dtype) -> nn.Module:
    """One to three hidden layers of odd widths; some layers have no bias."""
    widths = [7, *torch.randint(1, 20, (int(torch.randint(1, 4, ())),)).tolist(), 5]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bool(torch.randint(2, ()))), nn.Tanh()]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(11, 7, dtype=dtype).to(DEVICE), torch.randint(0, 5, (11,)).to(DEVICE)) for _ in range(STEPS)]


def closure(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return run


def watched(run: Callable[[], Tensor], net: nn.Module, seen: list[list[Tensor]]) -> Callable[[], Tensor]:
    """``run``, with the weights that it meets noted."""

    def watching() -> Tensor:
        seen.append(weights(net))
        return run()

    return watching


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("rho_max", [0.02, 10.0], ids=["capped", "uncapped"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_lesam_computes_the_same(backend: Any, dtype: torch.dtype, base: str, rho_max: float, seed: int) -> None:
    """Losses, weights and the base optimizer's state after each of several steps."""
    cls, kwargs = BASES[base]
    net, sigma = random_net(dtype), 0.05
    twin = copy.deepcopy(net)
    ours = LESAM(net.parameters(), cls, sigma=sigma, rho_max=rho_max, backend=backend, **kwargs)
    plain = SimpleLESAM(cls(twin.parameters(), **kwargs), sigma=sigma, rho_max=rho_max)
    for x, y in batches(dtype):
        losses = ours.step(closure(net, x, y)), plain.step(closure(twin, x, y))
        torch.testing.assert_close(*losses, **CLOSE[dtype])
        torch.testing.assert_close(weights(net), weights(twin), **CLOSE[dtype])
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            mine, theirs = ours.state[p], plain.base.state[q]
            for name in ("momentum_buffer",) if base == "sgd" else ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(mine[name], theirs[name], **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_climbs_by_the_papers_radius_and_comes_back_bit_for_bit(dtype: torch.dtype, seed: int) -> None:
    net, (sigma, rho_max) = random_net(dtype), (0.05, 0.1)
    optimizer = SimpleLESAM(torch.optim.SGD(net.parameters(), lr=0.0), sigma, rho_max)
    for x, y in batches(dtype):
        before = weights(net)
        gradient = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        g = torch.cat([t.flatten() for t in gradient]).double()
        seen: list[list[Tensor]] = []
        optimizer.step(watched(closure(net, x, y), net, seen))
        assert same_bits(seen[0], before)
        moved = torch.cat([(a - b).flatten() for a, b in zip(seen[1], before, strict=True)]).double()
        expected = min(sigma / (g.norm().item() + 1e-12), rho_max) * g / g.norm()
        tolerance = 4 * torch.finfo(dtype).eps * max(1.0, *(w.abs().max().item() for w in before))
        torch.testing.assert_close(moved, expected, rtol=0, atol=tolerance)
        assert same_bits(weights(net), before)


def test_a_gradient_of_zero_moves_nothing(seed: int) -> None:
    net = random_net(torch.float64)
    before = weights(net)
    optimizer = SimpleLESAM(torch.optim.SGD(net.parameters(), lr=0.1), sigma=0.05, rho_max=0.1)

    def run() -> Tensor:
        loss: Tensor = 0.0 * net(torch.ones(2, 7, dtype=torch.float64, device=DEVICE)).sum()
        loss.backward()
        return loss

    optimizer.step(run)
    assert same_bits(weights(net), before)


def test_it_is_short() -> None:
    """It is there to be read first."""
    assert len(inspect.getsource(simple).splitlines()) <= 40
