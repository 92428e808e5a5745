"""Sums taken during backward: their bits, their groups and stream, how long they and their hooks live, refusals."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import LESAM, SAM
from lesam_dist.optim.engine import early_sums
from lesam_dist.optim.engine.early_sums import EarlySums
from lesam_dist.optim.engine.rows import RowCache
from tests.optim.captures import both, replays
from tests.optim.early_norms import (
    BACKENDS,
    accumulated,
    assert_close,
    closure_of,
    pair,
    unused,
)
from tests.optim.nets import DEVICE


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups as a small net can have."""
    monkeypatch.setattr(early_sums, "LEAST_BYTES", 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("perturbed_only", [False, True])
def test_bits_depend_neither_on_the_order_of_arrival_nor_on_whether_anything_arrived(
    seed: int, backend: Any, perturbed_only: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 3000, (12,), generator=generator).tolist()
    params = [nn.Parameter(torch.zeros(size, device=DEVICE)) for size in sizes]
    grads = [torch.randn(size, generator=generator).to(DEVICE) * 10.0**i for i, size in enumerate(sizes)]
    rows = RowCache()
    rows.refresh([{"params": params[:9], "perturb": True}, {"params": params[9:], "perturb": False}])
    sums = EarlySums(rows.rows, backend)
    late = sums.take([grads], perturbed_only)[0]
    for _ in range(5):
        order = torch.randperm(12, generator=generator).tolist()
        for i in order:
            sums.arrived(params[i], grads[i])
        assert torch.equal(sums.take([grads], perturbed_only)[0], late)
        for i in order[:7]:  # the others are summed when they are asked for
            sums.arrived(params[i], grads[i])
        assert torch.equal(sums.take([grads], perturbed_only)[0], late)
    expected = sum(g.double().square().sum().item() for g in grads[: 9 if perturbed_only else 12])
    assert late.item() == pytest.approx(expected, rel=1e-6)


def test_groups_are_cut_from_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an eighth of all bytes or more; the last parameters, whose gradients come first, are in the first."""
    params = [nn.Parameter(torch.zeros(100)) for _ in range(32)]
    rows = RowCache()
    rows.refresh([{"params": params, "perturb": True}])
    groups = EarlySums(rows.rows, "reference")._sets[0].groups
    assert [len(group.rows.params) for group in groups] == [4] * 8
    assert groups[0].rows.params[0] is params[31]
    monkeypatch.setattr(early_sums, "LEAST_BYTES", 2**24)
    assert len(EarlySums(rows.rows, "reference")._sets[0].groups) == 1


def test_other_gradients_at_the_same_address(seed: int) -> None:
    """Gradients that were summed are kept until the step, so that no other can be taken for one of them."""

    def replaced(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
        passes = closure_of(net, seed)

        def closure() -> Tensor:
            loss = passes()
            values = [2.0 * p.grad for p in net.parameters()]  # type: ignore[operator]
            for p, value in zip(net.parameters(), values, strict=True):
                p.grad = None
                p.grad = value.clone()
            return loss

        return closure

    both = pair(seed, LESAM)
    for step in range(3):
        for net, optimizer in both:
            optimizer.step(replaced(net, seed + step))
        assert_close(both)


def test_on_cuda_sums_have_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """That waits for what made the gradients, and that a step waits for: only once, and before it lets go of them."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def current(stream: Stream) -> Iterator[None]:
        events.append(f"on {stream.name}")
        yield
        events.append("back")

    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    rows = RowCache()
    rows.refresh([{"params": params, "perturb": True}])
    sums = EarlySums(rows.rows, "reference")
    sums._sets[0]._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    early = ["side waits for main", "on side", "back"]
    for _ in range(2):
        events.clear()
        grads = [torch.full((4,), 1.0 + i) for i in range(2)]
        for p, grad in zip(params, grads, strict=True):
            sums.arrived(p, grad)
        assert events == 2 * early
        assert sums.take([grads])[0] == 4 * (1 + 4)
        assert events == [*2 * early, "main waits for side"]
        sums.drop()
        assert events == [*2 * early, "main waits for side"]
    sums.arrived(params[0], grads[0])
    sums.drop()  # nobody asked for the norm
    assert events[-4:] == [*early, "main waits for side"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [closure_of, unused, accumulated])
def test_gradients_live_no_longer_than_without(seed: int, make: Any, backend: Any) -> None:
    """Those of the first pass are gone when the second one begins, those of the second after the step."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    _, (net, optimizer) = pair(seed, LESAM, dtype, backend=backend)
    gradients: list[Any] = []

    def alive() -> int:
        return sum(gradient() is not None for gradient in gradients)

    for step in range(3):
        passes = make(net, seed + step)

        def closure(passes: Any = passes) -> Tensor:
            assert alive() == 0
            loss: Tensor = passes()
            gradients.extend(weakref.ref(p.grad) for p in net.parameters() if p.grad is not None)
            assert alive() > 0
            return loss

        optimizer.step(closure)
        assert alive() == 0


def test_an_exception_leaves_the_next_step_right(seed: int) -> None:
    both = pair(seed, LESAM)
    for step in range(3):
        for net, optimizer in both:
            passes, calls = closure_of(net, seed + step), iter(range(2))

            def failing() -> Tensor:
                loss = passes()  # noqa: B023
                if next(calls):  # noqa: B023
                    raise KeyError("second")
                return loss

            with pytest.raises(KeyError):
                optimizer.step(failing)
            optimizer.step(closure_of(net, seed + step))
        assert_close(both)


def test_hooks_end_with_the_optimizer(seed: int) -> None:
    """And there is one a parameter, whatever was loaded, added or copied in between."""
    _, (net, optimizer) = pair(seed, LESAM)
    optimizer.step(closure_of(net, seed))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure_of(net, seed))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64, device=DEVICE))]})
    optimizer.step(closure_of(net, seed))
    assert [len(hooks_of(p)) for p in net.parameters()] == [1] * 6
    other_net, other = copy.deepcopy((net, optimizer))
    other.step(closure_of(other_net, seed))
    optimizer.step(closure_of(net, seed))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other_net.parameters(), strict=True))
    assert [len(hooks_of(p)) for p in (*net.parameters(), *other_net.parameters())] == [1] * 12
    del optimizer
    gc.collect()
    assert [len(hooks_of(p)) for p in net.parameters()] == [0] * 6


def hooks_of(p: Tensor) -> dict[int, Any]:
    return p._post_accumulate_grad_hooks or {}  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="emulates graphs in Triton's interpreter")
def test_replays_of_a_graph_take_the_sums_of_its_gradients(seed: int) -> None:
    steps = both(seed, norm_in_backward=True)
    graph = steps[0].capture()
    replays(steps, graph, range(3, 6), lr=lambda n: 0.1 / n, sigma=lambda n: 0.3 / n)


def test_refusals() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="SAM: norm_in_backward takes the norms of both gradients, and with check_sec"):
        SAM(params, SGD, lr=0.1, norm_in_backward=True, check_second=False)
    with pytest.raises(ValueError, match=r"SAM\.sum_buckets: build it with norm_in_backward=True first"):
        SAM(params, SGD, lr=0.1).sum_buckets(nn.Linear(1, 1))  # type: ignore[arg-type]
    optimizer = SAM(params, SGD, lr=0.1, norm_in_backward=True)
    with pytest.raises(RuntimeError, match=r"SAM\.first_step: norm_in_backward=True leaves nothing between"):
        optimizer.first_step()
