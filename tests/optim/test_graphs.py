"""Steps in CUDA graphs, by `tests.fake_graph` where there is no GPU: a replay makes the step that eager code makes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lesam_dist import LESAM, optim
from lesam_dist.optim.engine.base_update import SCHEDULED
from tests.cost_meter import Meter
from tests.fake_graph import CaptureError, FakeGraph
from tests.methods import CASES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulates graphs in Triton's interpreter")

SGD_KWARGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


class Training:
    """A net, an optimizer, and a batch whose place never changes: the closures read it."""

    def __init__(self, seed: int, method: Any = LESAM, base: Any = SGD, closures: int = 1, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.net = nn.Linear(5, 3)
        kwargs = (SGD_KWARGS if base is SGD else {"lr": 0.01}) | kwargs
        self.optimizer = method(self.net.parameters(), base, backend="triton", **kwargs)
        self.x, self.y = torch.empty(8, 5), torch.zeros(8, dtype=torch.int64)
        self._closures = closures

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
                return backward(nn.functional.cross_entropy(self.net(self.x[part]), self.y[part]))

            return closure

        parts = [of(slice(i, None, self._closures)) for i in range(self._closures)]
        return self.optimizer.step(parts if len(parts) > 1 else parts[0])

    def set(self, **values: float) -> None:
        for group in self.optimizer.param_groups:
            group.update(values)

    def capture(self) -> FakeGraph:
        graph = FakeGraph()
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


def replays(
    pair: tuple[Training, Training], graph: FakeGraph, numbers: range, **schedules: Callable[[int], float]
) -> None:
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


@pytest.mark.parametrize(("base", "static_grads"), [(SGD, False), (SGD, True), (AdamW, False)])
def test_replays_make_the_steps_of_eager_code(seed: int, base: Any, static_grads: bool) -> None:
    pair = both(seed, base=base, static_grads=static_grads)
    graph = pair[0].capture()
    assert_same(*pair)  # a capture computes nothing
    replays(pair, graph, range(3, 7), lr=lambda n: 0.1 / n, sigma=lambda n: 0.3 / n, rho_max=lambda n: 0.01 * n)


def test_nothing_happens_before_the_scalars_are_pushed(seed: int) -> None:
    """The kernels do not know yet where the graph has its gradients; they must not read at random."""
    training, _ = both(seed)
    before = copy.deepcopy(training.net.state_dict())
    training.capture().replay()
    torch.testing.assert_close(training.net.state_dict(), before, rtol=0, atol=0)


def test_eager_steps_between_replays(seed: int) -> None:
    """They have gradients elsewhere, and leave the graph what it reads."""
    pair = both(seed)
    graph = pair[0].capture()
    eager_steps(pair, range(3, 5))  # before the first replay, too
    telemetry = dict(pair[0].optimizer.telemetry)
    for start in (5, 9):
        replays_alone(pair, graph, range(start, start + 2))
        eager_steps(pair, range(start + 2, start + 4))
        assert_same(*pair)
    assert telemetry.keys() == pair[1].optimizer.telemetry.keys()


def replays_alone(pair: tuple[Training, Training], graph: FakeGraph, numbers: range) -> None:
    for number in numbers:
        for training in pair:
            training.load(number)
        pair[0].optimizer.push_scalars()
        graph.replay()
        pair[1].step()
        assert_same(*pair)


def test_several_graphs_of_one_optimizer(seed: int) -> None:
    """Captured one after the other, the second after replays of the first, and replayed in turns."""
    pair = both(seed)
    graphs = [pair[0].capture(), pair[0].capture()]
    for number in range(3, 9):
        replays_alone(pair, graphs[number % len(graphs)], range(number, number + 1))
        if number == 5:
            graphs.append(pair[0].capture())


@pytest.mark.parametrize("closures", [2, 3])
def test_several_closures(seed: int, closures: int) -> None:
    """m-sharpness: each of its passes has gradients of its own."""
    pair = both(seed, closures=closures)
    replays(pair, pair[0].capture(), range(3, 6), lr=lambda n: 0.1 / n)


def test_the_two_step_form(seed: int) -> None:
    pair = both(seed)
    training, graph = pair[0], FakeGraph()
    with graph.capture():
        for make_step in (training.optimizer.first_step, training.optimizer.second_step):
            backward(nn.functional.cross_entropy(training.net(training.x), training.y))
            make_step(zero_grad=True)
    replays_alone(pair, graph, range(3, 6))


def test_a_replay_skips_what_is_not_finite(seed: int) -> None:
    pair = both(seed)
    graph = pair[0].capture()
    for number, bad in enumerate((False, True, True, False), start=3):
        for training in pair:
            training.load(number, bad)
        pair[0].optimizer.push_scalars()
        graph.replay()
        pair[1].step()
        assert_same(*pair)
    assert_same_telemetry(*pair)
    assert pair[0].optimizer.telemetry["skipped"].item() == 2


def test_param_groups_and_clipping(seed: int) -> None:
    pair = both(seed, max_grad_norm=0.3, alpha=0.5)
    replays(pair, pair[0].capture(), range(3, 6), lr=lambda n: 0.1 / n, plus_alpha=lambda n: 1.0 / n)


# ---- methods -----------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs" / "graphs.md"

# What no graph can hold, and why.
BY_NUMBER = "what a step does depends on its number"
REFUSED = {"looksam": BY_NUMBER, "eigen": BY_NUMBER}
# What may be scheduled between replays, where it is not lr and rho.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "lesam": ("lr", "sigma", "rho_max"),
    "lesam-adaptive": ("lr", "sigma"),
    "wsam": ("rho",),  # lr multiplies the part beside the base optimizer's step
}


@pytest.mark.parametrize("base", [SGD, pytest.param(AdamW, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
def test_methods(seed: int, name: str, base: Any) -> None:
    case = CASES[name]
    pair = both(seed, case.method, base, **case.kwargs)
    if name in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[name]):
            pair[0].capture()
        return
    names = SCHEDULES.get(name, ("lr", "rho"))
    replays(pair, pair[0].capture(), range(3, 5), **{key: lambda n: 0.1 / n for key in names})
    assert pair[0].optimizer.scheduled() >= set(names)


def test_the_table_of_methods_in_the_docs() -> None:
    """One line for each method of `tests.methods` that the project has."""
    lines = ["| method | one graph | settings that may change between replays |", "|---|---|---|"]
    for name, case in CASES.items():
        training = Training(0, case.method, **case.kwargs)
        eager_steps((training, training), range(1))
        own = training.optimizer.scheduled() - set(SCHEDULED[SGD])
        followed = f"{', '.join(f'`{key}`' for key in sorted(own))}; of the base "
        followed += "all" if "lr" in training.optimizer.scheduled() else "all but `lr`"
        line = f"| {name} | {'no: ' + REFUSED[name] if name in REFUSED else 'yes'} |"
        if name != "own":
            lines.append(f"{line} {'' if name in REFUSED else followed} |")
    assert "\n".join(lines) in DOCS.read_text(), "\n".join(lines)


def test_gradients_that_stay_in_place_cost_nine_passes() -> None:
    """They are zeroed three times, and twice autograd adds what it made to zeros: two reads and a write."""
    moved = {}
    for static_grads in (False, True):
        net = nn.Linear(40, 30, bias=False)
        optimizer = LESAM(net.parameters(), SGD, backend="triton", static_grads=static_grads, **SGD_KWARGS)
        meter = Meter()
        with meter, meter.interpreter():
            for _ in range(2):
                meter.clear()
                optimizer.step(lambda net=net: backward(net(torch.ones(1, 40)).sum()))
        moved[static_grads] = meter.moved
    assert moved[True] - moved[False] == 9 * net.weight.nbytes


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_capture_needs_a_step_before(seed: int) -> None:
    training = Training(seed)
    training.load(0)
    with pytest.raises(RuntimeError, match="before the first step"):
        training.capture()


def test_gradients_that_are_there_would_be_read_in_a_capture(seed: int) -> None:
    """To see whether they are zero."""
    training, _ = both(seed)
    training.net.weight.grad = torch.zeros_like(training.net.weight)
    with pytest.raises(RuntimeError, match=r"Call zero_grad\(\) before the capture"):
        training.capture()
    training.optimizer.zero_grad()
    training.capture()


@pytest.mark.parametrize("names", [(), ("lr",), ("sigma",)])
def test_a_schedule_may_step_before_a_capture(seed: int, names: tuple[str, ...]) -> None:
    """What is pushed before each replay need not be right in the capture."""
    pair = both(seed)
    for training in pair:
        training.set(**dict.fromkeys(names, 0.01))
    replays(pair, pair[0].capture(), range(3, 5))


def test_what_is_not_pushed_may_not_change_before_a_capture(seed: int) -> None:
    training, _ = both(seed, adaptive=True, eta=0.2)
    training.set(eta=0.1)
    with pytest.raises(RuntimeError, match="changed while a CUDA graph is captured"):
        training.capture()


@pytest.mark.parametrize(("base", "what"), [(SGD, "momentum_buffer"), (AdamW, "step")])
def test_state_is_not_made_in_a_capture(seed: int, base: Any, what: str) -> None:
    """Every replay would make it anew: a parameter has its first gradient there."""
    training = Training(seed, base=base)
    training.net.bias.requires_grad_(False)
    eager_steps((training, training), range(2))
    training.net.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"{what} would be made while"):
        training.capture()


def test_what_a_method_keeps_is_not_made_in_a_capture(seed: int) -> None:
    training = Training(seed, optim.FriendlySAM)
    training.optimizer.enabled = False
    eager_steps((training, training), range(2))
    training.optimizer.enabled = True
    training.optimizer.push_scalars()
    with pytest.raises(RuntimeError, match="keeps from step to step would be made while"):
        training.capture()


def test_the_reference_backend_is_refused(seed: int) -> None:
    training = Training(seed)
    training.optimizer = LESAM(training.net.parameters(), SGD, backend="reference", lr=0.1)
    eager_steps((training, training), range(2))
    with pytest.raises(RuntimeError, match="backend='reference' waits"):
        training.capture()


def test_a_base_that_must_be_told_by_the_host_is_refused(seed: int) -> None:
    training, _ = both(seed, base=RMSprop)
    with pytest.raises(RuntimeError, match="RMSprop must be told by the host"):
        training.capture()


def test_a_fused_base_that_no_kernel_replaces(seed: int) -> None:
    """torch's Adam makes its own step in the graph, and has its learning rate there."""
    pair = both(seed, base=Adam)
    graph = pair[0].capture()
    replays(pair, graph, range(3, 5), sigma=lambda n: 0.1 / n)
    pair[0].set(lr=0.5)
    with pytest.raises(RuntimeError, match=r"lr of param group 0 was 0.01 .* is 0.5 now"):
        pair[0].optimizer.push_scalars()


@pytest.mark.parametrize("between", ["skip", "reuse"])
def test_an_interval_is_refused(seed: int, between: str) -> None:
    training, _ = both(seed, ascent_interval=2, ascent_between=between)
    with pytest.raises(RuntimeError, match=BY_NUMBER):
        training.capture()


def test_replaced_state_needs_a_new_capture(seed: int) -> None:
    """A checkpoint's tensors are not those that the graph knows."""
    pair = both(seed)
    pair[0].capture()
    for training in pair:
        training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="capture again"):
        pair[0].optimizer.push_scalars()
    eager_steps(pair, range(3, 5))
    replays(pair, pair[0].capture(), range(5, 7))


CHANGES: dict[str, tuple[Any, dict[str, Any], str, Any]] = {
    "momentum is no more": (LESAM, {}, "momentum", 0.0),
    "lesam+ is no more": (LESAM, {"alpha": 0.5}, "plus_alpha", 0.0),
    "a metric": (LESAM, {"adaptive": True, "eta": 0.2}, "eta", 0.1),
    "an average": (optim.FriendlySAM, {}, "friendly_sigma", 0.5),
    "beside the base": (optim.WSAM, {"gamma": 0.8}, "lr", 0.01),
    "a factor": (optim.GSAM, {"alpha": 0.4}, "gsam_alpha", 0.1),
    "direction": (LESAM, {}, "maximize", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_graph_holds_fixed_does_not_change_unnoticed(seed: int, name: str) -> None:
    """It may change back, or for a capture of its own; each graph is then replayed with its own settings."""
    method, kwargs, key, value = CHANGES[name]
    pair = both(seed, method, **kwargs)
    graph, before = pair[0].capture(), pair[0].optimizer.param_groups[0][key]
    pair[0].set(**{key: value})
    with pytest.raises(RuntimeError, match="capture again"):
        pair[0].optimizer.push_scalars()
    pair[0].set(**{key: before})
    replays_alone(pair, graph, range(3, 5))


# ---- the emulation itself ----------------------------------------------------------------------------------------

FORBIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "wait": lambda t: t.sum().item(),
    "decide": lambda t: bool(t.any()),
    "staging": lambda t: t.copy_(torch.tensor([1.0, 2.0])),
    "number of the host": lambda t: t.mul_(torch.tensor(2.0)),
    "memory of the host": lambda t: t.pin_memory(),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_emulation_refuses(name: str) -> None:
    t = torch.ones(2)
    with FakeGraph().capture(), pytest.raises(CaptureError):
        FORBIDDEN[name](t)


def test_the_emulation_replays() -> None:
    """Operators in order, in place; nothing happens in the capture; its memory is lost between replays."""
    x, total = torch.ones(2), torch.zeros(2)
    graph, kept = FakeGraph(), []
    with graph.capture():
        square = x * x
        total.add_(square)
        kept.append(square[0] + 1)
    assert total.tolist() == [0, 0]
    for value, expected in ((2.0, 4.0), (3.0, 13.0)):
        x.fill_(value)
        graph.replay()
        assert total.tolist() == [expected] * 2
        assert kept[0].item() == value**2 + 1
    late = FakeGraph()
    with late.capture():
        buffer = torch.zeros(2, device="cpu")
        total.copy_(buffer)
    buffer.fill_(5.0)  # between capture and replay: too early
    late.replay()
    assert total.tolist() == [0, 0]
