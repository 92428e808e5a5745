"""A model under torch.cuda.make_graphed_callables: its passes are graphs, the steps are plain code around them.

`.grad` is then the graph's own memory: each backward writes there again, and no pass can keep what the last one left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import LESAM, optim
from tests.optim.nets import DEVICE

SETTINGS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "lesam": (LESAM, {}, 1),
    "lesam+": (LESAM, {"alpha": 0.5}, 1),  # keeps the first gradient
    "a list of closures": (LESAM, {}, 3),  # adds up gradients
    "lesam+, a list": (LESAM, {"alpha": 0.5}, 2),
    "reuse": (LESAM, {"ascent_interval": 2, "ascent_between": "reuse"}, 1),  # keeps it for the next step
    "friendly": (optim.FriendlySAM, {}, 1),
    "gsam": (optim.GSAM, {}, 1),
    "s2sam": (optim.S2SAM, {}, 1),
    "looksam": (optim.LookSAM, {"interval": 2}, 1),
    "eigen": (optim.EigenSAM, {"alpha": 0.3, "interval": 2, "power_steps": 2}, 1),  # more passes
}


class Emulated(nn.Module):
    """What torch's function makes of a module: outputs and gradients in memory that every call writes again."""

    def __init__(self, module: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.module = module
        params = tuple(module.parameters())
        static_in, static_out = sample.clone(), module(sample).detach()
        static_grads = [torch.zeros_like(p) for p in params]

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
                static_in.copy_(x)
                static_out.copy_(module(static_in))
                return static_out.detach()

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                with torch.enable_grad():
                    made = torch.autograd.grad(module(static_in), params, grads[0])
                for static, g in zip(static_grads, made, strict=True):
                    static.copy_(g)
                return None, *(static.detach() for static in static_grads)

        self._call = Graphed.apply
        self._params = params

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self._call(x, *self._params)
        return result


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(DEVICE)


def closures_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, count: int) -> Any:
    def of(part: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            loss.backward()
            return loss.detach()

        return closure

    closures = [of(part) for part in range(count)]
    return closures[0] if count == 1 else closures


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_around_graphs(seed: int, name: str) -> None:
    method, kwargs, count = SETTINGS[name]
    net = make_net()
    twin = copy.deepcopy(net)
    sample = torch.randn(8, 5, device=DEVICE)
    if DEVICE == "cuda":
        model: Any = torch.cuda.make_graphed_callables(net, (sample,))
    else:
        model = Emulated(net, sample)
    optimizers = [method(n.parameters(), SGD, lr=0.1, momentum=0.9, **kwargs) for n in (net, twin)]
    for _ in range(6):
        x, y = torch.randn(count, 8, 5, device=DEVICE), torch.randint(0, 3, (count, 8), device=DEVICE)
        losses = [
            optimizer.step(closures_of(m, x, y, count)) for optimizer, m in zip(optimizers, (model, twin), strict=True)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.skipif(DEVICE == "cuda", reason="about the emulation")
def test_the_emulation_overwrites_gradients(seed: int) -> None:
    """autograd hands out the static memory itself, as it does on a GPU; so gradients cannot stay in place."""
    net = make_net()
    model = Emulated(net, torch.randn(8, 5))
    p = next(net.parameters())
    model(torch.randn(8, 5)).sum().backward()
    first = p.grad
    assert first is not None
    before = first.clone()
    p.grad = None
    model(torch.randn(8, 5)).square().sum().backward()
    assert p.grad is not None
    assert p.grad.data_ptr() == first.data_ptr()
    assert not torch.equal(first, before)
