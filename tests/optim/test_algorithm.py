"""LE-SAM and SAM, in both backends, against a float64 implementation of the paper's Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist import LESAM, SAM, CosineBudget
from tests.oracles import SGD64, AdamW64, Weights, algorithm_1

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 6

# float32: a few hundred roundings of 6e-8 in two passes and the update, over STEPS steps. AdamW divides by
# sqrt(v), which amplifies the relative error of small gradients. float64: rounding of the same kind.
RTOL = {torch.float32: 2e-5, torch.float64: 1e-12}

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, object], Callable[..., object]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}, SGD64),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, SGD64),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, AdamW64),
}


class Problem:
    """A small net with tensors of odd sizes, a batch per step, and its gradient as a float64 function."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5)).double()
        self.x = torch.randn(STEPS, 11, 7, dtype=torch.float64)
        self.y = torch.randint(0, 5, (STEPS, 11))
        self.net = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5)).to(DEVICE, dtype)
        self.net.load_state_dict(self.model.state_dict())
        self.dtype = dtype

    def weights(self) -> Weights:
        # What the net starts from: the float32 roundings are part of the input, not of the error.
        return {name: p.detach().cpu().double().numpy() for name, p in self.net.named_parameters()}

    def gradient(self, w: Weights, t: int) -> Weights:
        params = {name: torch.tensor(value, requires_grad=True) for name, value in w.items()}
        out = torch.func.functional_call(self.model, params, (self.x[t].to(self.dtype).double(),))
        grads = torch.autograd.grad(nn.functional.cross_entropy(out, self.y[t]), list(params.values()))
        return {name: g.numpy() for name, g in zip(params, grads, strict=True)}

    def closure(self, t: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = self.net(self.x[t].to(DEVICE, self.dtype))
            loss = nn.functional.cross_entropy(out, self.y[t].to(DEVICE))
            loss.backward()
            return loss

        return run

    def assert_close(self, expected: Weights) -> None:
        for name, p in self.net.named_parameters():
            actual = p.detach().cpu().double().numpy()
            tol = RTOL[self.dtype]
            np.testing.assert_allclose(actual, expected[name], rtol=tol, atol=tol * np.abs(expected[name]).max())


CASES = [("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
@pytest.mark.parametrize("rho_max", [None, 0.02], ids=["uncapped", "capped"])
def test_lesam_follows_algorithm_1(
    seed: int, base: str, backend: str, dtype: torch.dtype, rho_max: float | None
) -> None:
    problem = Problem(dtype)
    cls, kwargs, oracle = BASES[base]
    optimizer = LESAM(problem.net.parameters(), cls, sigma=0.05, rho_max=rho_max, backend=backend, **kwargs)  # type: ignore[arg-type]
    budget = CosineBudget(optimizer, total_steps=STEPS, anneal_steps=4)
    start = problem.weights()

    def sigma(t: int) -> float:
        return 0.05 if t < 2 else 0.025 * (1 + math.cos(math.pi * (t - 2) / 3))

    expected, radii = algorithm_1(
        start, problem.gradient, oracle(**kwargs), steps=STEPS, sigma=sigma, rho_max=rho_max or math.inf
    )
    actual = []
    for t in range(STEPS):
        optimizer.step(problem.closure(t))
        actual.append(optimizer.telemetry["rho"].item())
        budget.step()
    np.testing.assert_allclose(actual, radii, rtol=1e-5, atol=1e-15)
    if rho_max is not None:
        assert max(radii) == rho_max > min(radii), "the cap must act, and not always, for the test to see it"
    problem.assert_close(expected)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_lesam_plus_mixes_both_gradients(seed: int, backend: str, dtype: torch.dtype, form: str) -> None:
    problem = Problem(dtype)
    optimizer = LESAM(
        problem.net.parameters(),
        torch.optim.SGD,
        sigma=0.05,
        rho_max=None,
        alpha=0.5,
        plus_form=form,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        lr=0.1,
        momentum=0.9,
    )
    expected, _ = algorithm_1(
        problem.weights(),
        problem.gradient,
        SGD64(lr=0.1, momentum=0.9),
        steps=STEPS,
        sigma=lambda t: 0.05,
        alpha=0.5,
        released=form == "released",
    )
    for t in range(STEPS):
        optimizer.step(problem.closure(t))
    problem.assert_close(expected)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=lambda v: str(v).replace("torch.", ""))
def test_sam_has_a_fixed_radius(seed: int, backend: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    optimizer = SAM(problem.net.parameters(), torch.optim.SGD, rho=0.1, backend=backend, lr=0.1)  # type: ignore[arg-type]
    expected, radii = algorithm_1(
        problem.weights(), problem.gradient, SGD64(lr=0.1), steps=STEPS, sigma=lambda t: 1e9, rho_max=0.1
    )
    assert set(radii) == {0.1}
    for t in range(STEPS):
        optimizer.step(problem.closure(t))
        assert optimizer.telemetry["rho"].item() == pytest.approx(0.1)
        assert "sigma" not in optimizer.telemetry
    problem.assert_close(expected)


def test_quadratic_has_its_closed_form(seed: int) -> None:
    """L = w'Aw/2: g = Aw, g_hat = A(w + rho g/||g||), so one step of SGD is known without any autograd."""
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T
    w0 = torch.randn(6, dtype=torch.float64)
    w = nn.Parameter(w0.clone())

    def closure() -> Tensor:
        loss = 0.5 * w @ a @ w
        loss.backward()
        return loss

    LESAM([w], torch.optim.SGD, sigma=0.2, rho_max=None, lr=0.01).step(closure)
    g = a @ w0
    g_hat = a @ (w0 + 0.2 * g / g.norm() ** 2)
    torch.testing.assert_close(w.detach(), w0 - 0.01 * g_hat, rtol=1e-12, atol=1e-12)


def test_loss_rises_by_the_budget(seed: int) -> None:
    """To first order L(w_hat) - L(w) = sigma (Eq. 11): the ratio goes to 1 as sigma goes to 0."""
    problem = Problem(torch.float64)
    for sigma, tolerance in [(1e-3, 1e-2), (1e-5, 1e-4)]:
        optimizer = LESAM(problem.net.parameters(), torch.optim.SGD, sigma=sigma, rho_max=None, lr=0.0)
        optimizer.step(problem.closure(0))
        rise = optimizer.telemetry["perturbed_loss"] - optimizer.telemetry["loss"]
        assert rise.item() / sigma == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("method", ["lesam", "sam"])
@pytest.mark.parametrize("base", BASES)
def test_zero_radius_is_the_base_optimizer_bit_for_bit(seed: int, base: str, method: str) -> None:
    """Of the reference, whose update is torch's fused one. The kernels' own rounds otherwise: see the test below."""
    problem, plain = Problem(torch.float32), Problem(torch.float32)
    plain.net.load_state_dict(problem.net.state_dict())
    plain.x, plain.y = problem.x, problem.y
    cls, kwargs, _ = BASES[base]
    optimizer = (
        LESAM(problem.net.parameters(), cls, sigma=0.0, backend="reference", **kwargs)
        if method == "lesam"
        else SAM(problem.net.parameters(), cls, rho=0.0, backend="reference", **kwargs)
    )
    reference = cls(plain.net.parameters(), fused=True, **kwargs)  # type: ignore[call-arg]
    for t in range(STEPS):
        optimizer.step(problem.closure(t))
        reference.zero_grad()
        plain.closure(t)()
        reference.step()
    for actual, expected in zip(problem.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("base", BASES)
def test_zero_radius_in_the_kernels_is_the_base_optimizer(seed: int, base: str) -> None:
    """In float64: torch's fused updates do not round as the kernels do, and on CUDA they compute in double."""
    problem = Problem(torch.float32)
    cls, kwargs, oracle = BASES[base]
    optimizer = LESAM(problem.net.parameters(), cls, sigma=0.0, backend="triton", **kwargs)
    expected, radii = algorithm_1(
        problem.weights(), problem.gradient, oracle(**kwargs), steps=STEPS, sigma=lambda t: 0.0  # type: ignore[arg-type]
    )  # fmt: skip
    assert set(radii) == {0.0}
    for t in range(STEPS):
        optimizer.step(problem.closure(t))
    problem.assert_close(expected)
