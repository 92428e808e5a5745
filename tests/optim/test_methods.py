"""Each method on a quadratic against its rule in float64, and what all of them share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, AdamW

from lesam_dist import optim
from tests.methods import CASES, LR, MOMENTUM, Vector, follow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 5
SETTINGS = [
    ("reference", torch.float64, False),
    ("reference", torch.float32, False),
    ("triton", torch.float32, False),
    ("reference", torch.float64, True),
    ("triton", torch.float32, True),
]
# Of the largest weight. float32: tens of roundings of 6e-8 per step. LookSAM and EigenSAM make a difference of nearly
# equal gradients, a tenth to a hundredth of them, as long as a gradient again.
ATOL = {torch.float64: 1e-10, torch.float32: 5e-6}
AMPLIFIED = {"looksam": 10, "eigen": 10}


class Quadratic(nn.Module):
    """L_t(w) = (w - c_t)' A (w - c_t) / 2 with a positive A; w in three tensors of odd sizes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        root = torch.randn(14, 14, dtype=torch.float64)
        self.a = (root @ root.T / 14 + 0.1 * torch.eye(14, dtype=torch.float64)).to(DEVICE, dtype)
        self.c = torch.randn(2 * STEPS, 14, dtype=torch.float64).to(DEVICE, dtype)
        self.parts = nn.ParameterList([torch.randn(shape).to(DEVICE, dtype) for shape in ((3, 2), (5,), (1, 3))])

    def forward(self, t: int) -> Tensor:
        d = torch.cat([p.flatten() for p in self.parts]) - self.c[t]
        return d @ self.a @ d / 2

    def flat(self) -> Vector:
        return np.concatenate([p.detach().cpu().double().numpy().ravel() for p in self.parts])

    def gradient(self, w: Vector, t: int) -> Vector:
        a, c = (x.cpu().double().numpy() for x in (self.a, self.c[t]))
        return np.asarray(a @ (w - c))

    def closure(self, t: int, scaler: GradScaler | None = None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = self(t)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        return run


def make(name: str, net: nn.Module, base: Any = SGD, **options: Any) -> optim.SharpnessAware:
    case = CASES[name]
    kwargs = {"lr": LR, **({"momentum": MOMENTUM} if base is SGD else {})}
    made: optim.SharpnessAware = case.method(net.parameters(), base, **case.kwargs, **kwargs, **options)  # type: ignore[call-arg, arg-type]
    return made


def close(net: Quadratic, expected: Vector, dtype: torch.dtype, name: str = "") -> None:
    atol = ATOL[dtype] * AMPLIFIED.get(name, 1) * np.abs(expected).max()
    np.testing.assert_allclose(net.flat(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "dtype", "maximize"), SETTINGS, ids=lambda v: str(v).replace("torch.", ""))
def test_follows_its_rule(seed: int, name: str, backend: str, dtype: torch.dtype, maximize: bool) -> None:
    """To maximize L is to minimize -L."""
    net = Quadratic(dtype)

    def gradient(w: Vector, t: int) -> Vector:
        return -net.gradient(w, t) if maximize else net.gradient(w, t)

    expected = follow(CASES[name].rule, net.flat(), gradient, STEPS)
    plain = follow(lambda w, grad, t, s: (grad(w), 0.0), net.flat(), gradient, STEPS)
    assert np.abs(expected - plain).max() > 1e-3, "the method must do something here"
    optimizer = make(name, net, backend=backend, maximize=maximize)
    calls = []
    for t in range(STEPS):
        run, count = net.closure(t), 0

        def closure(run: Callable[[], Tensor] = run, **arguments: Any) -> Tensor:
            nonlocal count
            assert not arguments, "only methods that need them ask for arguments"
            count += 1
            return run()

        optimizer.step(closure)
        calls.append(count)
    assert tuple(calls[:2]) == CASES[name].calls
    close(net, expected, dtype, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("how", ["torch", "checkpoint"])
def test_a_resumed_run_is_the_same_bit_for_bit(seed: int, name: str, base: Any, how: str) -> None:
    net = Quadratic(torch.float32)
    optimizer = make(name, net, base)
    for t in range(3):
        optimizer.step(net.closure(t))
    twin = copy.deepcopy(net)
    resumed = make(name, twin, base)
    if how == "torch":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        set_optimizer_state_dict(twin, resumed, copy.deepcopy(get_optimizer_state_dict(net, optimizer)))
    for t in range(3, STEPS):
        optimizer.step(net.closure(t))
        resumed.step(twin.closure(t))
    assert np.array_equal(net.flat(), twin.flat())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_loss_scaling_changes_nothing_and_an_overflow_is_survived(seed: int, name: str, backend: str) -> None:
    net = Quadratic(torch.float32)
    twin = copy.deepcopy(net)
    plain, scaled = make(name, net, backend=backend), make(name, twin, backend=backend)
    scaler = scaled.grad_scaler = GradScaler(DEVICE, init_scale=2.0**12)
    for t in range(3):
        plain.step(net.closure(t))
        scaled.step(twin.closure(t, scaler))
        scaler.update()
    close(twin, net.flat(), torch.float32, name)
    before = twin.flat()
    twin.c[3] = torch.inf
    scaled.step(twin.closure(3, scaler))
    scaler.update()
    assert np.array_equal(twin.flat(), before)
    assert (scaled.telemetry["skipped"].item(), scaler.get_scale()) == (1, 2.0**11)
    for t in (4, 5):  # nothing that is kept was spoilt
        scaled.step(twin.closure(t, scaler))
        scaler.update()
    assert np.isfinite(twin.flat()).all()
    assert scaled.telemetry["skipped"].item() == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_pushing_scalars_changes_no_bit(seed: int, name: str, backend: str) -> None:
    """As before each replay of a CUDA graph; also before there was any step."""
    nets = [Quadratic(torch.float32) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].a, nets[1].c = nets[0].a, nets[0].c
    optimizers = [make(name, net, backend=backend) for net in nets]
    for t in range(3):
        optimizers[1].push_scalars()
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = LR / (t + 1)
            optimizer.step(net.closure(t))
    assert np.array_equal(nets[0].flat(), nets[1].flat())


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("wsam", "wsam-coupled")])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_without_a_radius_it_is_the_base_optimizer(seed: int, name: str, backend: str) -> None:
    """Bit for bit, but for methods that mix or rescale gradients, which then only round."""
    net = Quadratic(torch.float32)
    twin = copy.deepcopy(net)
    case = CASES[name]
    kwargs = {**case.kwargs, ("sigma" if name.startswith("lesam") else "rho"): 0.0}
    if name == "looksam":
        kwargs["alpha"] = 0.0
    optimizer: Any = case.method(net.parameters(), SGD, backend=backend, lr=LR, momentum=MOMENTUM, **kwargs)  # type: ignore[call-arg, arg-type]
    fused = make("sam", twin, backend=backend)
    fused.param_groups[0]["rho"] = 0.0  # the same kernels, which round otherwise than torch's
    for t in range(STEPS):
        optimizer.step(net.closure(t))
        fused.step(twin.closure(t))
    if name in ("gsam", "ssam", "looksam"):
        close(net, twin.flat(), torch.float32)
    else:
        assert np.array_equal(net.flat(), twin.flat())


EQUAL: dict[str, tuple[tuple[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]] = {
    "gsam, alpha 0": ((optim.GSAM, {"rho": 0.1, "alpha": 0.0}), (optim.SAM, {"rho": 0.1})),
    "fisher, eta 0": ((optim.FisherSAM, {"rho": 0.1, "eta": 0.0}), (optim.SAM, {"rho": 0.1})),
    "friendly, sigma 0": ((optim.FriendlySAM, {"rho": 0.1, "sigma": 0.0}), (optim.SAM, {"rho": 0.1})),
    "eigen, alpha 0": ((optim.EigenSAM, {"rho": 0.1, "alpha": 0.0, "interval": 1}), (optim.SAM, {"rho": 0.1})),
    "wsam, gamma 1/2": ((optim.WSAM, {"rho": 0.1, "gamma": 0.5, "decouple": False}), (optim.SAM, {"rho": 0.1})),
    "looksam, interval 1": ((optim.LookSAM, {"rho": 0.1, "interval": 1}), (optim.SAM, {"rho": 0.1})),
    "lesam adaptive, eta": (
        (optim.LESAM, {"sigma": 1e9, "rho_max": 0.1, "adaptive": True, "eta": 0.01}),
        (optim.ASAM, {"rho": 0.1, "eta": 0.01}),
    ),
    "esam, all": ((optim.ESAM, {"rho": 0.1, "beta": 1.0, "gamma": 1.0}), (optim.SAM, {"rho": 0.1})),
}


@pytest.mark.parametrize("what", EQUAL)
@pytest.mark.parametrize(
    ("backend", "dtype"), [s[:2] for s in SETTINGS[:3]], ids=lambda v: str(v).replace("torch.", "")
)
def test_special_cases(seed: int, what: str, backend: str, dtype: torch.dtype) -> None:
    net = Quadratic(dtype)
    twin = copy.deepcopy(net)
    optimizers = []
    for model, (method, kwargs) in zip((net, twin), EQUAL[what], strict=True):
        optimizers.append(method(model.parameters(), SGD, backend=backend, lr=LR, momentum=MOMENTUM, **kwargs))
    for t in range(STEPS):
        optimizers[0].step(net.closure(t))
        optimizers[1].step(twin.closure(t))
    close(net, twin.flat(), dtype)


def test_lesam_with_the_budget_of_sams_radius_is_sam(seed: int) -> None:
    """To first order SAM spends rho * ||g|| of the loss."""
    net = Quadratic(torch.float64)
    twin = copy.deepcopy(net)
    lesam = optim.LESAM(net.parameters(), SGD, rho_max=None, lr=LR, momentum=MOMENTUM)
    sam = optim.SAM(twin.parameters(), SGD, rho=0.1, lr=LR, momentum=MOMENTUM)
    for t in range(STEPS):
        lesam.param_groups[0]["sigma"] = 0.1 * float(np.linalg.norm(net.gradient(net.flat(), t)))
        lesam.step(net.closure(t))
        sam.step(twin.closure(t))
    close(net, twin.flat(), torch.float64)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_friendly_averages_start_at_the_first_gradient_that_counts(seed: int, backend: Any, bad_pass: int) -> None:
    """Not in a step that is skipped, later where the gradient comes late; saved and loaded between any two."""
    shapes = [(3,), (2, 2), (4,)]
    params = [nn.Parameter(torch.randn(s, device=DEVICE)) for s in shapes]
    optimizer = optim.FriendlySAM(params, SGD, rho=0.3, sigma=0.8, lam=0.6, backend=backend, lr=0.0)
    average: list[Any] = [None] * 3
    for t in range(5):
        grads: list[Any] = [torch.randn(s, device=DEVICE) for s in shapes]
        grads[2][0] = 0.0  # a dead unit's: its average is zero, and not a beginning
        if t == 4:
            grads[2][0] = 1.0
        if t < 3:
            grads[1] = None  # unfrozen at step 3
        before = [p.detach().clone() for p in params]
        d = [g if m is None or g is None else g - 0.8 * m for g, m in zip(grads, average, strict=True)]
        norm = torch.cat([x.flatten() for x in d if x is not None]).norm()
        bad = t in (0, 2)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        if bad and bad_pass == 0:
            params[0].grad[0] = torch.nan  # type: ignore[index]
        optimizer.first_step()
        for p, w, x in zip(params, before, d, strict=True):
            moved = 0.0 if x is None or (bad and bad_pass == 0) else 0.3 * x / norm
            torch.testing.assert_close(p.detach(), w + moved)
        if bad and bad_pass == 1:
            params[0].grad[0] = torch.nan  # type: ignore[index]
        optimizer.second_step()
        if not bad:
            pairs = zip(average, grads, strict=True)
            average = [m if g is None else g if m is None else 0.6 * m + 0.4 * g for m, g in pairs]
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = optim.FriendlySAM(params, SGD, rho=0.3, sigma=0.8, lam=0.6, backend=backend, lr=0.0)
        optimizer.load_state_dict(state)
    for i, m in enumerate(average):
        torch.testing.assert_close(optimizer.state_dict()["state"][i]["friendly_ema"], m)


@pytest.mark.parametrize("bad_pass", [0, -1])
@pytest.mark.parametrize(("name", "calls"), [("friendly", 2), ("looksam", 2), ("s2sam", 1), ("eigen", 8)])
def test_a_skipped_step_remembers_nothing(seed: int, name: str, calls: int, bad_pass: int) -> None:
    net = Quadratic(torch.float32)
    optimizer = make(name, net)
    for t in range(4):
        optimizer.step(net.closure(t))
    before, state = net.flat(), copy.deepcopy(optimizer.state_dict()["state"])
    asked = []

    def closure() -> Tensor:
        asked.append(None)
        loss = net(4) * (torch.nan if len(asked) - 1 == bad_pass % calls else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(asked) == calls
    assert optimizer.telemetry["skipped"].item() == 1
    assert np.array_equal(net.flat(), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("decouple", [True, False])
def test_wsam_where_a_pass_leaves_a_gradient_out(seed: int, backend: Any, decouple: bool) -> None:
    """Missing in the second pass: the parameter stays, as with torch. Missing in the first: it counts as zero."""
    first, second, both = (nn.Parameter(torch.randn(5, device=DEVICE)) for _ in range(3))
    params = [first, second, both]
    optimizer = optim.WSAM(params, SGD, gamma=0.8, decouple=decouple, backend=backend, lr=0.1)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        g, g_hat = torch.randn(2, 3, 5, device=DEVICE)
        first.grad, second.grad, both.grad = g[0].clone(), None, g[2].clone()
        optimizer.first_step(zero_grad=True)
        first.grad, second.grad, both.grad = None, g_hat[1].clone(), g_hat[2].clone()
        optimizer.second_step(zero_grad=True)
        # Plain SGD: decoupled and coupled are the same sum, g + 4 (g_hat - g) and 4 g_hat - 3 g.
        assert torch.equal(first.detach(), before[0])
        torch.testing.assert_close(second.detach(), before[1] - 0.1 * 4 * g_hat[1])
        torch.testing.assert_close(both.detach(), before[2] - 0.1 * (4 * g_hat[2] - 3 * g[2]))


def test_what_is_kept_of_a_parameter_ends_with_its_gradient(seed: int) -> None:
    """S2-SAM perturbs by the gradient of the step before, in which this parameter had none."""
    a, b = (nn.Parameter(torch.randn(4)) for _ in range(2))
    optimizer = optim.S2SAM([a, b], SGD, rho=0.3, lr=0.0)
    for with_b in (True, False, True):
        before = b.detach().clone()
        optimizer.first_step()
        moved = not torch.equal(b.detach(), before)
        a.grad, b.grad = torch.randn(4), torch.randn(4) if with_b else None
        optimizer.second_step()
    assert not moved
