"""A training whose step may be captured, beside one of eager steps; without a GPU graphs are emulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import LESAM
from tests.fake_graph import FakeGraph, RealGraph
from tests.optim.nets import DEVICE

Graph: Any = RealGraph if DEVICE == "cuda" else FakeGraph

SGD_KWARGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}

BY_NUMBER = "what a step does depends on its number"
"""Why some settings are in no graph."""


class Training:
    """A net, an optimizer, and a batch whose place never changes: the closures read it."""

    def __init__(self, seed: int, method: Any = LESAM, base: Any = SGD, closures: int = 1, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.net = nn.Linear(5, 3).to(DEVICE)
        kwargs = (SGD_KWARGS if base is SGD else {"lr": 0.01}) | kwargs
        self.optimizer = method(self.net.parameters(), base, backend="triton", **kwargs)
        self.x, self.y = torch.empty(8, 5, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
        self._closures = closures
        self.scaler: torch.amp.GradScaler | None = None

    def load(self, number: int, bad: bool = False) -> None:
        """The batch of a step."""
        generator = torch.Generator().manual_seed(number)
        self.x.copy_(torch.randn(8, 5, generator=generator))
        self.y.copy_(torch.randint(0, 3, (8,), generator=generator))
        if bad:
            self.x[0, 0] = float("inf")

    def step(self) -> Tensor:
        def of(part: slice) -> Callable[..., Tensor]:
            def closure() -> Tensor:
                loss = nn.functional.cross_entropy(self.net(self.x[part]), self.y[part])
                backward(loss if self.scaler is None else self.scaler.scale(loss))
                return loss

            return closure

        parts = [of(slice(i, None, self._closures)) for i in range(self._closures)]
        loss: Tensor = self.optimizer.step(parts if len(parts) > 1 else parts[0])
        if self.scaler is not None:
            self.scaler.update()
        return loss

    def set(self, **values: float) -> None:
        for group in self.optimizer.param_groups:
            group.update(values)

    def capture(self) -> Any:
        graph = Graph()
        with graph.capture():
            self.loss = self.step()
        return graph


def assert_same(a: Training, b: Training) -> None:
    """Bit for bit."""
    torch.testing.assert_close(a.net.state_dict(), b.net.state_dict(), rtol=0, atol=0)
    mine, its = (t.optimizer.state_dict()["state"] for t in (a, b))
    torch.testing.assert_close(mine, its, rtol=0, atol=0)


def assert_same_telemetry(a: Training, b: Training) -> None:
    assert a.optimizer.telemetry.keys() == b.optimizer.telemetry.keys()
    for name, value in a.optimizer.telemetry.items():
        torch.testing.assert_close(value, b.optimizer.telemetry[name], rtol=0, atol=0)


def eager_steps(pair: tuple[Training, Training], numbers: range) -> None:
    for number in numbers:
        for training in pair:
            training.load(number)
            training.step()


def replays(pair: tuple[Training, Training], graph: Any, numbers: range, **schedules: Callable[[int], float]) -> None:
    """A replay for one of the two, an eager step for the other, and they stay the same."""
    for number in numbers:
        for training in pair:
            training.load(number)
            training.set(**{name: schedule(number) for name, schedule in schedules.items()})
        pair[0].optimizer.push_scalars()
        graph.replay()
        loss = pair[1].step()
        assert_same(*pair)
        assert_same_telemetry(*pair)
        assert torch.equal(pair[0].loss, loss)


def both(seed: int, *args: Any, **kwargs: Any) -> tuple[Training, Training]:
    """One for graphs and one for eager steps, after three eager steps each."""
    pair = Training(seed, *args, **kwargs), Training(seed, *args, **kwargs)
    eager_steps(pair, range(3))
    return pair


def replays_alone(pair: tuple[Training, Training], graph: Any, numbers: range) -> None:
    for number in numbers:
        for training in pair:
            training.load(number)
        pair[0].optimizer.push_scalars()
        graph.replay()
        pair[1].step()
        assert_same(*pair)


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss
