"""Norms taken while backward goes on: the numbers of the plain step, no sum left in it, and what makes it sum anew."""

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
from torch.amp import GradScaler
from torch.optim import SGD

from lesam_dist import LESAM, SAM
from lesam_dist.optim.engine import early_sums
from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.optim.engine.early_sums import EarlySums
from lesam_dist.optim.engine.rows import RowCache
from lesam_dist.train.passes import BatchPasses
from tests.methods import CASES
from tests.optim import test_graphs
from tests.optim.nets import DEVICE

BACKENDS = ("reference", "triton")
LAYERS = 3  # each a group


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups as a small net can have."""
    monkeypatch.setattr(early_sums, "LEAST_BYTES", 1)


class Launches:
    """Counts the sums that are taken, by where: in backward, in the step for a group, in the step for everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backward = self.groups = self.whole = 0
        self._inside = False
        for ops in ops_classes():
            for name in ("sum_sq_first", "sum_sq_second"):
                monkeypatch.setattr(ops, name, self._counted(getattr(ops, name)))
        sum_up = early_sums._Group.sum_up

        def sum_of_group(group: Any) -> None:
            self._inside = True
            sum_up(group)
            self._inside = False

        monkeypatch.setattr(early_sums._Group, "sum_up", sum_of_group)

    def _counted(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(ops: Any, *args: Any) -> Tensor:
            if self._inside and torch._C._current_graph_task_id() >= 0:
                self.backward += 1
            elif self._inside:
                self.groups += 1
            elif len(args) < 4 or args[3] is None:
                self.whole += 1
            return method(ops, *args)

        return counted

    def take(self) -> tuple[int, int, int]:
        """Since the last call."""
        counts = self.backward, self.groups, self.whole
        self.backward = self.groups = self.whole = 0
        return counts


def ops_classes() -> list[type]:
    from lesam_dist.optim.engine.reference_backend import ReferenceOps
    from lesam_dist.optim.engine.triton_backend import TritonOps

    return [ReferenceOps, TritonOps]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    layers = [nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def batch(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 7, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x, torch.randint(3, (12,), generator=generator).to(DEVICE)


def closure_of(net: nn.Module, seed: int, scaler: GradScaler | None = None) -> BatchPasses:
    x, y = batch(seed, next(net.parameters()).dtype)
    return BatchPasses(net, nn.CrossEntropyLoss(), x, y, scaler=scaler)


def pair(
    seed: int, method: Any, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> list[tuple[nn.Sequential, SharpnessAware]]:
    """Two equal nets, the first with a plain optimizer, the second with norms in backward."""
    torch.manual_seed(seed)
    net = make_net(dtype)
    nets = [net, copy.deepcopy(net)]
    build = [
        method(each.parameters(), SGD, lr=0.1, momentum=0.9, norm_in_backward=early, **kwargs)
        for each, early in zip(nets, (False, True), strict=True)
    ]
    return list(zip(nets, build, strict=True))


def assert_close(pair: list[tuple[nn.Sequential, SharpnessAware]]) -> None:
    """Weights and telemetry but for the order in which sums were added up."""
    (first, plain), (second, early) = pair
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-12 * p.abs().max()
    for name, value in plain.telemetry.items():
        torch.testing.assert_close(early.telemetry[name].double(), value.double(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_every_method_takes_the_step_that_it_takes_without(seed: int, name: str) -> None:
    case = CASES[name]
    both = pair(seed, case.method, backend="reference", **case.kwargs)
    for step in range(4):
        for net, optimizer in both:
            optimizer.step(closure_of(net, seed + step))
        assert_close(both)


@pytest.mark.parametrize("name", CASES)
def test_every_method_takes_the_same_step_with_a_loss_scale(seed: int, name: str) -> None:
    """Whether it works with scaled gradients, whose sums were taken, or takes the scale off first."""
    case = CASES[name]
    both = pair(seed, case.method, backend="reference", **case.kwargs)
    (net, plain), (twin, early) = both
    scaler = early.grad_scaler = GradScaler(DEVICE, init_scale=2.0**12)
    for step in range(4):
        plain.step(closure_of(net, seed + step))
        early.step(closure_of(twin, seed + step, scaler))
        scaler.update()
        assert_close(both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_scaled_gradients_are_taken_in_backward(launches: Launches, seed: int, backend: str) -> None:
    """And tell of an overflow in either pass."""
    _, (net, optimizer) = pair(seed, LESAM, torch.float32, backend=backend)
    scaler = optimizer.grad_scaler = GradScaler(DEVICE, init_scale=2.0**12)
    optimizer.step(closure_of(net, seed, scaler))
    scaler.update()
    launches.take()
    optimizer.step(closure_of(net, seed + 1, scaler))
    scaler.update()
    assert launches.take() == (2 * LAYERS, 0, 0)
    before = [p.clone() for p in net.parameters()]
    for bad_pass in range(2):
        passes = [closure_of(net, seed, scaler) for _ in range(2)]
        passes[bad_pass].images *= torch.inf
        calls = iter(passes)
        optimizer.step(lambda calls=calls: next(calls)())
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))
        assert scaler.get_scale() == 2.0 ** (11 - bad_pass)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sum_is_left_in_the_step(launches: Launches, seed: int, backend: str) -> None:
    _, (net, optimizer) = pair(seed, LESAM, torch.float32, backend=backend)
    optimizer.step(closure_of(net, seed))
    assert launches.take() == (LAYERS, LAYERS, 0)  # the first gradient came before the parameters were known
    for step in range(1, 4):
        optimizer.step(closure_of(net, seed + step))
        assert launches.take() == (2 * LAYERS, 0, 0)


def test_the_last_of_several_backward_passes_counts(launches: Launches, seed: int) -> None:
    both = pair(seed, LESAM)
    for step in range(3):
        for net, optimizer in both:
            launches.take()
            optimizer.step(micro_batches(net, seed + step))
        assert_close(both)
    assert launches.take() == (2 * 3 * LAYERS, 0, 0)  # of two passes through three parts of the batch


OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.1},
    "unchecked": {"max_grad_norm": 0.1, "check_second": False},
    "static": {"static_grads": True},
    "skip": {"ascent_interval": 2},
    "reuse": {"ascent_interval": 2, "ascent_between": "reuse"},
    "fraction": {"ascent_fraction": 0.5},
    "plus": {"alpha": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(launches: Launches, seed: int, options: dict[str, Any]) -> None:
    both = pair(seed, LESAM, **options)
    for step in range(4):
        for net, optimizer in both:
            launches.take()
            optimizer.step(closure_of(net, seed + step))
        again = step % 2 == 1 and "ascent_between" in options  # along what was kept, not along a gradient
        assert launches.take()[1:] == (0, int(again)) or step == 0
        assert_close(both)


def unused(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    """A closure that gives the last layer no gradient in every second step."""
    x, _ = batch(seed, next(net.parameters()).dtype)

    def closure() -> Tensor:
        loss = net[: 2 if seed % 2 else 5](x).square().mean()
        loss.backward()
        return loss  # type: ignore[no-any-return]

    return closure


def accumulated(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    """A closure of two backward passes, the second of them for the first layers alone."""
    x, y = batch(seed, next(net.parameters()).dtype)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        other = net[:3](x).square().mean()
        other.backward()
        return loss + other.detach()

    return closure


def micro_batches(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    x, y = batch(seed, torch.float64)
    return BatchPasses(net, nn.CrossEntropyLoss(), x, y, micro_batches=3)


def changed(net: nn.Sequential, seed: int) -> Callable[..., Tensor]:
    """A closure that changes gradients after its backward: in place, by others, and by none."""
    passes = closure_of(net, seed)

    def closure() -> Tensor:
        loss = passes()
        first, second, third = (net[i].weight for i in (0, 2, 4))
        first.grad.mul_(3.0)
        second.grad = second.grad * 0.5
        third.grad = None
        return loss

    return closure


@pytest.mark.parametrize("make", [unused, accumulated, micro_batches, changed])
def test_sums_are_of_the_gradients_that_the_step_sees(seed: int, make: Any) -> None:
    both = pair(seed, LESAM)
    for step in range(4):
        for net, optimizer in both:
            optimizer.step(make(net, seed + step))
        assert_close(both)


def test_groups_that_are_not_perturbed_count_in_the_second_norm_alone(launches: Launches, seed: int) -> None:
    torch.manual_seed(seed)
    nets = [make_net(torch.float64)]
    nets.append(copy.deepcopy(nets[0]))
    both = []
    for net, early in zip(nets, (False, True), strict=True):
        net[2].bias.requires_grad_(False)
        groups = [
            {"params": net[0].parameters(), "perturb": False},
            {"params": [*net[2].parameters(), *net[4].parameters()]},
        ]
        both.append((net, LESAM(groups, SGD, lr=0.1, max_grad_norm=0.01, norm_in_backward=early)))
    for step in range(3):
        for net, optimizer in both:
            launches.take()
            optimizer.step(closure_of(net, seed + step))
        assert_close(both)
    assert launches.take() == (2 * (LAYERS + 1), 0, 0)  # two of those that are not perturbed, two of the others
    for net, optimizer in both:
        net[0].bias.requires_grad_(False)
        net[2].bias.requires_grad_(True)  # which has no hook
        optimizer.step(closure_of(net, seed))
    assert_close(both)


def test_sequence_of_closures(seed: int) -> None:
    both = pair(seed, LESAM)
    for step in range(3):
        for net, optimizer in both:
            optimizer.step([closure_of(net, seed + step), unused(net, seed + step)])
        assert_close(both)


@pytest.mark.parametrize("bad", [0, 1])
def test_gradient_that_is_not_finite_skips(seed: int, bad: int) -> None:
    _, (net, optimizer) = pair(seed, LESAM)
    optimizer.step(closure_of(net, seed))
    before = [p.detach().clone() for p in net.parameters()]
    calls = iter(range(2))
    x, y = batch(seed, torch.float64)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y) * (float("inf") if next(calls) == bad else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.telemetry["skipped"] == 1
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))


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
    steps = test_graphs.both(seed, norm_in_backward=True)
    graph = steps[0].capture()
    test_graphs.replays(steps, graph, range(3, 6), lr=lambda n: 0.1 / n, sigma=lambda n: 0.3 / n)


def test_refusals() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="SAM: norm_in_backward takes the norms of both gradients, and with check_sec"):
        SAM(params, SGD, lr=0.1, norm_in_backward=True, check_second=False)
    with pytest.raises(ValueError, match=r"SAM\.sum_buckets: build it with norm_in_backward=True first"):
        SAM(params, SGD, lr=0.1).sum_buckets(nn.Linear(1, 1))  # type: ignore[arg-type]
    optimizer = SAM(params, SGD, lr=0.1, norm_in_backward=True)
    with pytest.raises(RuntimeError, match=r"SAM\.first_step: norm_in_backward=True leaves nothing between"):
        optimizer.first_step()
