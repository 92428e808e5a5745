"""Steps inside torch.compile and inference_mode: the numbers of a plain loop, there and afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM
from lesam_dist.optim.engine.backend import choose
from lesam_dist.optim.engine.rows import Rows
from tests.optim.nets import DEVICE, make_net

BACKENDS = ["reference", "triton"]


def by_closure(optimizer: LESAM, loss: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def by_hand(optimizer: LESAM, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.first_step(zero_grad=True)
    loss().backward()
    optimizer.second_step(zero_grad=True)


def compiled(step: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(step, backend="eager")  # the compiler's front: it traces the optimizer


def inferring(step: Callable[..., None]) -> Callable[..., None]:
    def run(optimizer: LESAM, loss: Callable[[], Tensor]) -> None:
        with torch.inference_mode():
            step(optimizer, loss)

    return run


@pytest.mark.parametrize(
    ("mode", "way"), [(compiled, by_closure), (compiled, by_hand), (inferring, by_closure)], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mode_changes_nothing(seed: int, backend: Any, mode: Callable[..., Any], way: Callable[..., None]) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 5, device=DEVICE), torch.randint(0, 3, (8,), device=DEVICE)
    kwargs = {"lr": 0.1, "momentum": 0.9, "backend": backend, "alpha": 0.5}
    optimizer = LESAM(net.parameters(), torch.optim.SGD, **kwargs)
    plain = LESAM(twin.parameters(), torch.optim.SGD, **kwargs)
    inside = mode(way)
    for step in range(4):
        (inside if step < 2 else way)(optimizer, lambda: nn.functional.cross_entropy(net(x), y))
        way(plain, lambda: nn.functional.cross_entropy(twin(x), y))
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    assert optimizer.telemetry["rho"].item() == plain.telemetry["rho"].item()


def test_restore_in_inference_mode(seed: int) -> None:
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    with torch.inference_mode():
        optimizer.first_step()
        optimizer.restore()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    optimizer.first_step()
    optimizer.second_step()
    assert not torch.equal(net[0].weight, before["0.weight"])


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "expected"),
    [
        ("cuda", torch.float32, "auto", "triton"),
        ("cuda", torch.bfloat16, "auto", "triton"),
        ("cuda", torch.float64, "auto", "reference"),
        ("cuda", torch.float64, "triton", "triton"),  # which says that it has no float64
        ("cpu", torch.float32, "auto", "reference"),
        ("cuda", torch.float32, "reference", "reference"),
    ],
)
def test_auto_is_what_can_treat_the_parameters(device: str, dtype: torch.dtype, backend: str, expected: str) -> None:
    params: list[Tensor] = [torch.empty(3, device="meta"), torch.empty(3, dtype=dtype, device="meta")]
    rows = Rows(torch.device(device), None, params=params)
    assert choose(backend, rows) == expected  # type: ignore[arg-type]
