"""torch.autocast keeps its casts of the weights while the outermost one is open: the passes must not share them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM, EigenSAM, SharpnessAware
from tests.optim.nets import DEVICE, make_net

Passes = Callable[..., Tensor]


def cast(cache: bool) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, cache_enabled=cache)


def around_everything(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    with cast(cache):
        for _ in range(3):
            optimizer.step(closure)


def around_a_step(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    for _ in range(3):
        with cast(cache):
            optimizer.step(closure)


def inside_the_closure(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    def run() -> Tensor:
        with cast(cache):
            return closure()

    for _ in range(3):
        optimizer.step(run)


def both(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    with cast(cache):
        inside_the_closure(optimizer, closure, cache)


def several_closures(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    with cast(cache):
        for _ in range(3):
            optimizer.step([closure, closure])


def plain_steps(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    with cast(cache):
        for enabled in (False, True, False):
            optimizer.enabled = enabled
            optimizer.step(closure)


def by_hand(optimizer: SharpnessAware, closure: Passes, cache: bool) -> None:
    with cast(cache):
        for _ in range(3):
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        closure()
        optimizer.first_step(zero_grad=True)
        optimizer.restore()


NESTINGS = [around_everything, around_a_step, inside_the_closure, both, several_closures, plain_steps, by_hand]
# The kernels' update is their own; all else is shared.
SETTINGS = [("reference", way) for way in NESTINGS] + [
    ("triton", way) for way in (around_everything, plain_steps, by_hand)
]


def losses_seen(
    net: nn.Module, x: Tensor, y: Tensor, optimizer: SharpnessAware, way: Passes, cache: bool
) -> list[float]:
    """Every loss that the closure computed, and one more at the end, under the same autocast."""
    seen: list[float] = []

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        seen.append(loss.item())
        return loss.detach()

    with cast(cache) if way is not inside_the_closure else torch.enable_grad():
        way(optimizer, closure, cache)
        closure()
    return seen


@pytest.mark.parametrize(("backend", "way"), SETTINGS, ids=lambda v: getattr(v, "__name__", v))
def test_every_nesting_gives_the_losses_of_an_autocast_without_cache(seed: int, backend: str, way: Passes) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 5, device=DEVICE), torch.randint(0, 3, (8,), device=DEVICE)
    make = lambda model: LESAM(model.parameters(), torch.optim.SGD, sigma=1.0, rho_max=1.0, lr=0.5, backend=backend)  # noqa: E731
    expected = losses_seen(twin, x, y, make(twin), way, cache=False)
    assert losses_seen(net, x, y, make(net), way, cache=True) == expected
    assert len(set(expected)) > len(expected) // 2, "the losses must differ for the test to see anything"


def test_probes_of_the_hessian_are_cast_anew(seed: int) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 5, device=DEVICE), torch.randint(0, 3, (8,), device=DEVICE)
    make = lambda model: EigenSAM(model.parameters(), torch.optim.SGD, rho=0.5, interval=1, probe=0.3, lr=0.5)  # noqa: E731
    expected = losses_seen(twin, x, y, make(twin), around_everything, cache=False)
    assert losses_seen(net, x, y, make(net), around_everything, cache=True) == expected
