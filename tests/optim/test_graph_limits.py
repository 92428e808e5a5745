"""What a CUDA graph of a step cannot hold is refused, and what it holds fixed does not change unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, RMSprop

from lesam_dist import LESAM, optim
from tests.fake_graph import CaptureError, FakeGraph
from tests.optim.captures import BY_NUMBER, Graph, Training, both, eager_steps, replays, replays_alone
from tests.optim.nets import DEVICE


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


def test_scalars_are_not_pushed_within_a_capture(seed: int) -> None:
    training, _ = both(seed)
    with Graph().capture(), pytest.raises(RuntimeError, match="before each replay"):
        training.optimizer.push_scalars()


def test_new_groups_need_a_new_capture(seed: int) -> None:
    pair = both(seed)
    pair[0].capture()
    for training in pair:
        more = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        training.optimizer.add_param_group({"params": [more], "lr": 0.5})
    with pytest.raises(RuntimeError, match="capture again"):
        pair[0].optimizer.push_scalars()
    eager_steps(pair, range(3, 5))
    replays(pair, pair[0].capture(), range(5, 7), sigma=lambda n: 0.1 / n)


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
    pair = both(seed, base=Adam, fused=True, capturable=DEVICE == "cuda")
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

emulation = pytest.mark.skipif(DEVICE == "cuda", reason="about the emulation")

FORBIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "wait": lambda t: t.sum().item(),
    "decide": lambda t: bool(t.any()),
    "staging": lambda t: t.copy_(torch.tensor([1.0, 2.0])),
    "number of the host": lambda t: t.mul_(torch.tensor(2.0)),
    "memory of the host": lambda t: t.pin_memory(),
}


@emulation
@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_emulation_refuses(name: str) -> None:
    t = torch.ones(2)
    with FakeGraph().capture(), pytest.raises(CaptureError):
        FORBIDDEN[name](t)


@emulation
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
