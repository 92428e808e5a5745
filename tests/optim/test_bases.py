"""Base optimizers of every make: torch's fused ones where they leave state unwritten, and ones from elsewhere."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lesam_dist import GSAM, LESAM, SAM, CosineBudget, SharpnessAware
from lesam_dist.optim.engine.fused import make_momentum
from tests.optim.nets import DEVICE, make_closure, make_net, same, snapshot

BACKENDS = ["reference", "triton"]
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True, "weight_decay": 0.01},
    "dampening": {"dampening": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.01},
    "tensor-lr": {"lr": torch.tensor(0.1)},
}


class SignDescent(Optimizer):
    """A base from elsewhere: none of torch's own keys in its groups, state of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                total = self.state[p].setdefault("total", torch.zeros_like(p))
                total += p.grad
                p.sub_(total.sign(), alpha=group["lr"])


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch leaves unwritten is memory that others used: full of large numbers."""
    empty_like = torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(float("nan") if torch.rand(()) < 0.5 else 1e30) if tensor.is_floating_point() else tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", poisoned)
        yield


def oracle(weights: list[Tensor], grads: list[list[Tensor | None]], **kwargs: Any) -> list[Tensor]:
    """torch's SGD, one tensor at a time, in float64; the steps with a non-finite gradient left out."""
    params = [nn.Parameter(w.detach().double()) for w in weights]
    plain = SGD(params, fused=False, foreach=False, **kwargs)
    for step in grads:
        if all(bool(g.isfinite().all()) for g in step if g is not None):
            for p, g in zip(params, step, strict=True):
                p.grad = None if g is None else g.double()
            plain.step()
    return [p.detach() for p in params]


def apply(
    optimizer: SharpnessAware, params: list[nn.Parameter], grads: list[list[Tensor | None]], bad: int = 0
) -> None:
    """Steps by given gradients in both passes; those that are not finite only from pass ``bad`` on."""
    for step in grads:
        for number in range(2):
            for p, g in zip(params, step, strict=True):
                skip = g is not None and not g.isfinite().all() and number < bad
                p.grad = None if g is None else torch.ones_like(g) if skip else g.clone()
            (optimizer.second_step if number else optimizer.first_step)(zero_grad=True)


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_an_overflow_in_the_first_steps_leaves_no_trace(
    seed: int, garbage: None, backend: str, bad_pass: int, kind: str
) -> None:
    """torch's fused SGD allocates the momentum, skips, and later uses what the memory held."""
    kwargs = MOMENTUM | SGDS[kind]
    params = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (7, 300)]
    before = [p.detach().clone() for p in params]
    grads: list[list[Tensor | None]] = [[torch.randn_like(p) for p in params] for _ in range(5)]
    for step in grads[:2]:
        step[1][3] = float("inf")  # type: ignore[index]
    optimizer = SAM(params, SGD, backend=backend, **kwargs)  # type: ignore[arg-type]
    apply(optimizer, params, grads, bad_pass)
    assert optimizer.telemetry["skipped"].item() == 2
    for p, expected in zip(params, oracle(before, grads, **kwargs), strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_plain_fused_sgd_survives_an_overflow_in_its_first_step(seed: int, garbage: None) -> None:
    """The same under a scaler of torch's, as the trainer steps without a method."""
    w = nn.Parameter(torch.randn(7, device=DEVICE))
    before, grads = w.detach().clone(), [[torch.randn(7, device=DEVICE)] for _ in range(4)]
    grads[0][0][2] = float("inf")
    optimizer = SGD([w], fused=True, **MOMENTUM)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0, growth_interval=100)
    scaler.scale(torch.zeros((), device=DEVICE))
    for step in grads:
        w.grad = step[0] * scaler.get_scale()
        make_momentum(optimizer)
        scaler.step(optimizer)
        scaler.update()
    (expected,) = oracle([before], grads, **MOMENTUM)  # type: ignore[arg-type]
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_gradients_may_come_late(seed: int, garbage: None, backend: str, kind: str) -> None:
    """Layers that are unfrozen, heads that alternate, blocks that are skipped; one such step overflows."""
    kwargs = MOMENTUM | SGDS[kind]
    params = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (7, 300, 20)]
    before = [p.detach().clone() for p in params]
    present = [(1, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)]
    grads = [[torch.randn_like(p) if there else None for p, there in zip(params, row, strict=True)] for row in present]
    grads[3][2].fill_(float("nan"))  # type: ignore[union-attr]
    optimizer = SAM(params, SGD, backend=backend, **kwargs)  # type: ignore[arg-type]
    apply(optimizer, params, grads)
    for p, expected in zip(params, oracle(before, grads, **kwargs), strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_from_elsewhere_makes_its_own_step(seed: int, backend: str) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    optimizer = SAM(net.parameters(), SignDescent, rho=0.0, lr=0.1, backend=backend)  # type: ignore[arg-type]
    plain = SignDescent(twin.parameters(), lr=0.1)
    for _ in range(3):
        grads: list[list[Tensor | None]] = [[torch.randn_like(p) for p in net.parameters()]]
        apply(optimizer, list(net.parameters()), grads)
        for p, g in zip(twin.parameters(), grads[0], strict=True):
            p.grad = g
        plain.step()
        optimizer.push_scalars()
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    states = zip(optimizer.state.values(), plain.state.values(), strict=True)
    assert all(torch.equal(mine["total"], its["total"]) for mine, its in states)


def test_a_base_that_only_says_it_is_fused_is_asked_before_it_steps(seed: int) -> None:
    """Only torch's own kernels read the flag on the device."""

    class Fused(SignDescent):
        def __init__(self, params: Any, lr: float) -> None:
            Optimizer.__init__(self, params, {"lr": lr, "fused": True})

    w = nn.Parameter(torch.randn(5))
    before = w.detach().clone()
    apply(SAM([w], functools.partial(Fused, lr=0.1)), [w], [[torch.full((5,), float("inf"))]])
    assert torch.equal(w, before)


class Wrapper(Optimizer):
    """A base that wraps another one: its groups and state are computed, and cannot be set."""

    def __init__(self, params: Any, lr: float) -> None:
        self.inner = SGD(params, lr=lr, momentum=0.9)
        self.added = 0
        super().__init__([{"params": [nn.Parameter(torch.zeros(1))]}], {})

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        if groups:
            raise AttributeError("has no setter")  # what torch's own constructor sets is nothing

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        if state:
            raise AttributeError("has no setter")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._built_by_torch(param_group):
            return
        self.added += 1
        self.inner.add_param_group(param_group)

    def _built_by_torch(self, param_group: dict[str, Any]) -> bool:
        return len(param_group) == 1 and param_group["params"][0].shape == (1,)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class Counting(SGD):
    """A base with more in its state_dict, and a rule of its own to load it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.steps = 0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mask"] = torch.arange(p.numel(), device=p.device) % 2

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for p, own in self.state.items():
            p.grad.view(-1)[own["mask"]] = 0  # type: ignore[union-attr]
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, own in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
            self.state[p]["mask"] = own["mask"]  # torch's rule makes it floating
        self.steps = state_dict["steps"]


@pytest.mark.parametrize("base", [Wrapper, Counting])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_base_makes_in_its_constructor_stays(seed: int, backend: str, base: Any) -> None:
    """And goes through a state_dict; the base is asked to add groups and to load by its own rules."""
    nets = [make_net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain = base(nets[1].parameters(), lr=0.1)
    optimizer = SAM(nets[0].parameters(), base, rho=0.0, lr=0.1, backend=backend)  # type: ignore[arg-type]
    for step in range(4):
        grads: list[list[Tensor | None]] = [[torch.randn_like(p) for p in nets[0].parameters()]]
        apply(optimizer, list(nets[0].parameters()), grads)
        for p, g in zip(nets[1].parameters(), grads[0], strict=True):
            p.grad = g
        plain.step()
        if step == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = SAM(nets[0].parameters(), base, rho=0.0, lr=0.7, backend=backend)  # type: ignore[arg-type]
            optimizer.load_state_dict(saved)
    assert same(nets[0], snapshot(nets[1]))
    assert optimizer.base_optimizer.state is optimizer.state
    if isinstance(optimizer.base_optimizer, Counting):
        assert optimizer.base_optimizer.steps == 4
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert optimizer.base_optimizer.param_groups[1]["rho"] == 0.0
    if isinstance(optimizer.base_optimizer, Wrapper):
        assert optimizer.base_optimizer.added == 1


def test_a_base_whose_state_dict_is_of_another_shape_is_not_saved_in_part(seed: int) -> None:
    class Another(SGD):
        def state_dict(self) -> dict[str, Any]:
            return {"inner": super().state_dict()}

    net = make_net()
    optimizer = SAM(net.parameters(), Another, lr=0.1)
    optimizer.step(make_closure(net))
    with pytest.raises(RuntimeError, match=r"Another has no state and param_groups in its own but inner"):
        optimizer.state_dict()


def test_creating_state_moves_nothing_with_any_base(seed: int) -> None:
    """torch.distributed.checkpoint steps with zero gradients and a rate of zero, which is not zero for every base."""

    class Restless(SignDescent):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1
                    p.data.mul_(0.9)

    net = make_net()
    before = snapshot(net)
    optimizer = SAM(net.parameters(), Restless, lr=0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(net, before)
    assert "step" not in optimizer.param_groups[0]
    assert all(own["step"] == 0 for own in optimizer.state.values())


def test_groups_keep_what_a_plain_checkpoint_does_not_know(seed: int) -> None:
    a, b = (nn.Parameter(torch.randn(4)) for _ in range(2))
    checkpoint = SGD([{"params": [a]}, {"params": [b]}], lr=0.05).state_dict()
    optimizer = LESAM([{"params": [a]}, {"params": [b], "perturb": False, "sigma": 0.7}], SGD, lr=0.1)
    budget = CosineBudget(optimizer, total_steps=10, anneal_steps=10)
    budget.step()
    optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[1]["lr"] == 0.05
    assert optimizer.param_groups[1]["perturb"] is False
    budget.step()
    assert optimizer.param_groups[1]["sigma"] == pytest.approx(0.7 * budget.factor(2))

    follows = GSAM([{"params": [a]}, {"params": [b], "lr": 0.4}], SGD, rho=0.2, rho_min=0.1, lr=0.2)
    follows.load_state_dict(checkpoint)
    assert [group["lr_max"] for group in follows.param_groups] == [0.2, 0.4]
    assert follows.radius(follows.param_groups[0]).rho_max == pytest.approx(0.1 + 0.1 * 0.05 / 0.2)


def test_a_group_that_is_added_later_has_its_schedules(seed: int) -> None:
    a, b = (nn.Parameter(torch.randn(4)) for _ in range(2))
    optimizer = LESAM([a], SGD, sigma=0.3, lr=0.1)
    budget = CosineBudget(optimizer, total_steps=10, anneal_steps=10)
    budget.step()
    optimizer.add_param_group({"params": [b], "sigma": 0.5})
    budget.step()
    assert budget.get_last_sigma() == [pytest.approx(s * budget.factor(2)) for s in (0.3, 0.5)]
    follows = GSAM([a], SGD, rho=0.2, rho_min=0.1, lr=0.2)
    follows.add_param_group({"params": [b], "lr": 0.4})
    follows.param_groups[1]["lr"] = 0.1
    assert follows.radius(follows.param_groups[1]).rho_max == pytest.approx(0.125)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_weights_twice_are_refused(seed: int) -> None:
    a = nn.Parameter(torch.randn(4))
    with pytest.raises(ValueError, match="the same parameter twice"):
        SAM([a, a], SGD, lr=0.1)
    optimizer = SAM([a], SGD, lr=0.1)
    b = nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match="the same parameter twice"):
        optimizer.add_param_group({"params": [b, b]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(a.detach())]})
    a.grad, before = torch.ones(4), a.detach().clone()
    with pytest.raises(ValueError, match="are the same memory"):
        optimizer.first_step()
    assert torch.equal(a, before)


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scheduler_and_hooks_on_the_base_see_its_steps(seed: int, backend: str, fused: bool) -> None:
    """A hook sees the exact weights and the second gradient before the update, and the new weights after it."""
    net = make_net()
    optimizer = SAM(net.parameters(), SGD, rho=0.5, lr=0.1, fused=fused, backend=backend)  # type: ignore[arg-type]
    base = optimizer.base_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(base, step_size=1, gamma=0.5)
    optimizer.step(make_closure(net))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05

    before = snapshot(net)
    second, seen = [], []
    closure = make_closure(net)

    def run() -> Tensor:
        loss = closure()
        second.append([p.grad.clone() for p in net.parameters()])  # type: ignore[union-attr]
        return loss

    pre = base.register_step_pre_hook(
        lambda *_: seen.append((snapshot(net), [p.grad.clone() for p in net.parameters()]))  # type: ignore[union-attr]
    )
    post = base.register_step_post_hook(lambda *_: seen.append((snapshot(net), [])))
    optimizer.step(run)
    assert len(seen) == 2
    assert all(map(torch.equal, seen[0][0], before))
    assert all(map(torch.equal, seen[0][1], second[1]))
    for w, g, after in zip(before, second[1], seen[1][0], strict=True):
        torch.testing.assert_close(after, w - 0.05 * g)
    pre.remove()
    post.remove()
    optimizer.step(run)
    assert len(seen) == 2
