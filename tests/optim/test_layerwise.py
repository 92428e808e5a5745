"""LARS and LAMB: against timm's and a float64 oracle, alone and as bases of every method; skipped steps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lesam_dist import SAM
from lesam_dist.optim import LAMB, LARS
from tests.cost_meter import Meter, Waits
from tests.layerwise import LAMB64, LARS64, Array
from tests.methods import CASES, LR, RHO, State, Vector, unit
from tests.optim.test_methods import Quadratic

STEPS = 5
SHAPES = [(4, 5), (7, 2, 2), (5,), (), (3, 1), (1, 6)]
LAYERWISE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lars": (LARS, LARS64, {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.05, "trust_coefficient": 0.02}),
    "lars-nesterov": (LARS, LARS64, {"lr": 0.3, "nesterov": True, "trust_coefficient": 0.02, "eps": 1e-3}),
    "lars-plain": (LARS, LARS64, {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.05}),
    "lamb": (LAMB, LAMB64, {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.05}),
    "lamb-plain": (LAMB, LAMB64, {"lr": 0.03, "eps": 1e-3}),
}


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def arrays(tensors: list[Any]) -> list[Any]:
    return [None if t is None else t.detach().double().numpy().copy() for t in tensors]


@pytest.mark.parametrize("name", LAYERWISE)
def test_timms(seed: int, name: str) -> None:
    """timm's LARS adapts what has weight decay, or all with always_adapt; its LAMB clips first, unless told not to."""
    cls, _, kwargs = LAYERWISE[name]
    ours = parameters()
    theirs = copy.deepcopy(ours)
    optimizer = cls(ours, adapt=True, **kwargs)
    if cls is LARS:
        renamed = {"trust_coeff" if k == "trust_coefficient" else k: v for k, v in kwargs.items()}
        other: Optimizer = timm.optim.Lars(theirs, always_adapt=True, **({"momentum": 0.9} | renamed))
    else:
        other = timm.optim.Lamb(theirs, always_adapt=True, max_grad_norm=None, **({"weight_decay": 0.0} | kwargs))
    for _ in range(STEPS):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LAYERWISE)
def test_its_formula(seed: int, name: str, dtype: torch.dtype) -> None:
    """Biases are not adapted; a layer of zeros, a gradient of zeros, and one that comes in some steps only."""
    cls, oracle, kwargs = LAYERWISE[name]
    params = parameters(dtype)
    with torch.no_grad():
        params[0].zero_()
    expected, optimizer, other = arrays(list(params)), cls(params, **kwargs), oracle(**kwargs)
    for t in range(STEPS):
        grads: list[Tensor | None] = [torch.randn_like(p) for p in params]
        if t % 2:
            grads[1], grads[4] = None, torch.zeros_like(params[4])
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        other.step(expected, arrays(grads))
    # A step has about ten roundings, of numbers no larger than the weights on the way.
    rtol = 100 * torch.finfo(dtype).eps
    for p, w in zip(params, expected, strict=True):
        np.testing.assert_allclose(p.detach().double().numpy(), w, rtol=0, atol=rtol * (1 + np.abs(w).max()))


def test_groups_set_their_own(seed: int) -> None:
    """Each group is an optimizer of its own: what it adapts, decays and how far it goes."""
    params = parameters()
    before = copy.deepcopy(params)
    settings: list[dict[str, Any]] = [{"lr": 0.5, "adapt": False}, {"weight_decay": 0.1, "adapt": True}]
    halves = [params[:3], params[3:]]
    for cls in (LARS, LAMB):
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        together = cls([{"params": half, **own} for half, own in zip(halves, settings, strict=True)], lr=0.1)
        twins = copy.deepcopy(params)
        apart = [cls(half, **({"lr": 0.1} | own)) for half, own in zip([twins[:3], twins[3:]], settings, strict=True)]
        for _ in range(2):
            for p, q in zip(params, twins, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            for optimizer in (together, *apart):
                optimizer.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_a_base_that_skips_leaves_no_trace(seed: int, cls: Any) -> None:
    """In the first step too, which makes the state."""
    params, twins = parameters(), parameters()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    optimizers = [SAM(own, cls, lr=0.1, weight_decay=0.01, rho=0.05) for own in (params, twins)]

    def step(bad: int | None, which: list[int]) -> None:
        grads = [[torch.randn_like(p) for p in params] for _ in range(2)]
        if bad is not None:
            grads[bad][1].view(-1)[3] = float("nan")
        for index in which:
            own, optimizer = (params, twins)[index], optimizers[index]
            for number, call in enumerate((optimizer.first_step, optimizer.second_step)):
                for p, g in zip(own, grads[number], strict=True):
                    p.grad = g.clone()
                call(zero_grad=True)

    step(0, [0])
    step(1, [0])
    step(None, [0, 1])
    step(1, [0])
    step(None, [0, 1])
    assert optimizers[0].telemetry["skipped"].item() == 3
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    first, second = (optimizer.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [LARS, LAMB])
@pytest.mark.parametrize("skips", [None, 0.0, 1.0])
def test_no_host_waits(seed: int, cls: Any, skips: float | None) -> None:
    """Neither for a norm, nor for lr, nor for whether to skip."""
    params = parameters(torch.float32)
    before = copy.deepcopy(params)
    optimizer = cls(params, lr=torch.tensor(0.1), weight_decay=0.01)
    for p in params:
        p.grad = torch.full_like(p, float("nan")) if skips else torch.randn_like(p)
    if skips is not None:
        optimizer.found_inf = torch.tensor(skips)
    with Meter() as meter, Waits() as waits:
        optimizer.step()
    assert (meter.reads, waits.total()) == (0, 0)
    for p, w in zip(params, before, strict=True):
        assert torch.equal(p, w) == bool(skips)


@pytest.mark.parametrize("cls", [LARS, LAMB])
def test_a_state_dict_goes_on_bit_for_bit(seed: int, cls: Any) -> None:
    params = parameters(torch.float32)
    optimizer = cls(params, lr=0.1)
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]

    def steps(own: list[nn.Parameter], optimizer: Any, which: range) -> None:
        for t in which:
            for p, g in zip(own, grads[t], strict=True):
                p.grad = g
            optimizer.step()

    steps(params, optimizer, range(2))
    twins = copy.deepcopy(params)
    other = cls(twins, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(params, optimizer, range(2, 4))
    steps(twins, other, range(2, 4))
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


SETTINGS = {
    "lars": {"lr": LR, "trust_coefficient": 0.5, "weight_decay": 0.01},
    "lamb": {"lr": LR, "weight_decay": 0.01},
}


@pytest.mark.parametrize("base", SETTINGS)
@pytest.mark.parametrize("method", CASES)
def test_the_base_of_every_method(seed: int, base: str, method: str) -> None:
    """The method's own float64 rule, and the oracle's step with what it descends along."""
    net, case = Quadratic(torch.float64), CASES[method]
    cls, oracle, _ = LAYERWISE[base]
    kwargs = SETTINGS[base]
    optimizer = case.method(net.parameters(), cls, **case.kwargs, **kwargs)  # type: ignore[call-arg, arg-type]
    weights, other, state = arrays(list(net.parameters())), oracle(**kwargs), State()

    def along_momentum(w: Vector, grad: Any, t: int, s: State) -> tuple[Vector, float]:
        return grad(w - RHO * unit(flat(other.momenta(len(weights)))) if t else w), 0.0

    rule = along_momentum if method == "msam" else case.rule
    for t in range(STEPS):
        g, beside = rule(flat(weights), lambda x, t=t: net.gradient(x, t), t, state)  # type: ignore[misc]
        other.step(weights, split(g, weights))
        for w, part in zip(weights, split(beside + np.zeros_like(g), weights), strict=True):
            w -= part
        optimizer.step(net.closure(t))
    np.testing.assert_allclose(net.flat(), flat(weights), rtol=0, atol=1e-9 * np.abs(flat(weights)).max())


def flat(weights: list[Array]) -> Vector:
    return np.concatenate([w.ravel() for w in weights])


def split(vector: Vector, like: list[Array]) -> list[Any]:
    ends = np.cumsum([w.size for w in like])[:-1]
    return [part.reshape(w.shape) for part, w in zip(np.split(vector, ends), like, strict=True)]


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (LARS, {"trust_coefficient": 0.0}, "LARS: trust_coefficient is 0.0"),
        (LARS, {"momentum": 1.0}, "LARS: momentum is 1.0"),
        (LARS, {"momentum": 0.0, "nesterov": True}, "LARS: nesterov is True but momentum is 0"),
        (LARS, {"eps": -1.0}, "LARS: eps is -1.0"),
        (LAMB, {"betas": (0.9, 1.0)}, r"LAMB: betas is \(0.9, 1.0\)"),
        (LAMB, {"weight_decay": -0.1}, "LAMB: weight_decay is -0.1"),
    ],
)
def test_bad_values(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(2))], **kwargs)
