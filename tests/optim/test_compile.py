"""torch.compile around a user's whole training step: where it is cut, what is compiled, and that it is compiled once.

`test_modes` holds the numbers of both backends against an uncompiled loop.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lesam_dist import LESAM
from tests.optim.nets import DEVICE, make_net

TrainStep = Callable[[nn.Module, LESAM, Tensor, Tensor], Tensor]


def by_closure(net: nn.Module, optimizer: LESAM, x: Tensor, y: Tensor) -> Tensor:
    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    loss: Tensor = optimizer.step(closure)
    return loss


def by_hand(net: nn.Module, optimizer: LESAM, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.second_step(zero_grad=True)
    return loss.detach()


class Compiler:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, inner: str) -> None:
        self.graphs: list[int] = []  # operators of each
        self._inner = torch._dynamo.lookup_backend(inner)

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs.append(sum(node.op.startswith("call") for node in module.graph.nodes))
        return self._inner(module, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


INDUCTOR = pytest.param(
    by_closure,
    "inductor",
    marks=[pytest.mark.full, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler of C++")],
)


@pytest.mark.parametrize(("train_step", "inner"), [(by_closure, "eager"), (by_hand, "aot_eager"), INDUCTOR])
def test_a_schedule_compiles_nothing_anew(seed: int, train_step: TrainStep, inner: str) -> None:
    """lr, sigma and rho_max are other numbers in every step; the weights follow those of an uncompiled loop."""
    net = make_net().double()  # in float32 a ReLU makes more of the rounding now and then
    twin = copy.deepcopy(net)
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "backend": "reference"}
    optimizers = [LESAM(model.parameters(), torch.optim.SGD, **kwargs) for model in (net, twin)]
    compiler = Compiler(inner)
    compiled, model = (torch.compile(f, backend=compiler) for f in (train_step, net))  # type: ignore[call-overload]
    for step in range(6):
        for optimizer in optimizers:
            optimizer.param_groups[0].update(lr=0.1 / (step + 1), sigma=0.3 / (step + 1), rho_max=0.05 * (step + 1))
        x, y = torch.randn(8, 5, device=DEVICE).double(), torch.randint(0, 3, (8,), device=DEVICE)
        # The first step finds no state and no tables, the second no new ones.
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            loss = compiled(model, optimizers[0], x, y).detach()
        expected = train_step(twin, optimizers[1], x, y).detach()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-10)
    assert compiler.graphs


def test_a_closure_is_not_compiled_with_the_step() -> None:
    """Nothing but the call of `step` is in the compiled function; the closure runs inside it, as it is."""
    compiler = Compiler("eager")
    take(torch.compile(by_closure, backend=compiler), make_net())
    assert compiler.graphs == []
    assert all("SharpnessAware.step" in reason for reason in counters["graph_break"])


def test_a_model_compiled_by_itself_is_one_graph() -> None:
    """Inside the closure, inside the compiled step; its backward is compiled with it."""
    compiler, net = Compiler("eager"), make_net()
    take(torch.compile(by_closure, backend=compiler), torch.compile(net, backend=compiler), net)  # type: ignore[arg-type]
    assert compiler.graphs == [3]  # linear, relu, linear


def test_a_loop_is_cut_at_both_steps_and_at_backward() -> None:
    """torch cuts at every ``backward()``; beside it the optimizer's two methods cut, and nothing else."""
    compiler = Compiler("eager")
    take(torch.compile(by_hand, backend=compiler), make_net())
    assert compiler.graphs[:2] == [4, 4]  # forward and loss of both passes
    reasons = list(counters["graph_break"])
    names = ("SharpnessAware.first_step", "SharpnessAware.second_step")
    ours = {name for name in names for reason in reasons if name in reason}
    assert ours == set(names)
    assert all("backward" in reason or any(name in reason for name in names) for reason in reasons)


@pytest.mark.parametrize(("train_step", "named"), [(by_closure, r"SharpnessAware\.step"), (by_hand, "backward")])
def test_fullgraph_is_an_error_of_torch(train_step: TrainStep, named: str) -> None:
    """Which names what it cannot have in one graph; nothing was stepped."""
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(torch._dynamo.exc.Unsupported, match=named):
        take(torch.compile(train_step, backend="eager", fullgraph=True), net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def take(train_step: TrainStep, model: nn.Module, net: nn.Module | None = None) -> None:
    """Two steps."""
    optimizer = LESAM((net or model).parameters(), torch.optim.SGD, lr=0.1)
    for _ in range(2):
        train_step(model, optimizer, torch.randn(8, 5, device=DEVICE), torch.randint(0, 3, (8,), device=DEVICE))
