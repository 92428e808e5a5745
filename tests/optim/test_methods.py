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


def test_gsam_radius_follows_the_learning_rate() -> None:
    optimizer = optim.GSAM([nn.Parameter(torch.ones(2))], SGD, rho=0.6, rho_min=0.1, lr_min=0.1, lr=1.0)
    for lr, rho in ((1.0, 0.6), (0.1, 0.1), (0.55, 0.35), (0.0, 0.1 - 0.5 / 9)):
        optimizer.param_groups[0]["lr"] = lr
        assert optimizer.radius(optimizer.param_groups[0]).rho_max == pytest.approx(rho)


def test_eigensam_finds_the_largest_curvature(seed: int) -> None:
    net = Quadratic(torch.float64)
    optimizer = optim.EigenSAM(net.parameters(), SGD, interval=1, power_steps=60, lr=1e-3)
    for t in range(3):
        optimizer.step(net.closure(t))
    state = optimizer.state_dict()["state"]
    v = torch.cat([state[i]["eigenvector"].flatten() for i in range(3)]).cpu().numpy()
    a = net.a.cpu().numpy()
    np.testing.assert_allclose(v @ a @ v, np.linalg.eigvalsh(a)[-1], rtol=1e-2)
    assert np.linalg.norm(v) == pytest.approx(1.0)


class Samples(nn.Module):
    """A loss per sample, (w - c_i)' A_i (w - c_i), and the passes that ESAM asks for."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign
        self.w = nn.ParameterList([torch.randn(3, dtype=torch.float64) for _ in range(4)])
        self.a, self.c = torch.rand(10, 12, dtype=torch.float64), torch.randn(10, 12, dtype=torch.float64)
        self.asked: list[dict[str, Any]] = []

    def losses(self, w: Tensor) -> Tensor:
        return (self.a * (w - self.c) ** 2).sum(dim=1)

    def closure(self, **arguments: Any) -> Tensor:
        self.asked.append(arguments)
        losses = self.sign * self.losses(torch.cat(list(self.w)))
        if arguments.get("subset") is not None:
            losses = losses[arguments["subset"]]
        if arguments.get("backward", True):
            losses.mean().backward()
        return losses.detach() if arguments.get("per_sample") else losses.mean().detach()


@pytest.mark.parametrize("sign", [1, -1], ids=["minimize", "maximize"])
@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 1.0), (1.0, 0.35), (0.5, 0.35)])
def test_esam_perturbs_some_tensors_and_keeps_the_samples_that_rose_most(
    seed: int, beta: float, gamma: float, sign: int
) -> None:
    net = Samples(sign)
    own = {"rho": 0.3, "beta": beta, "gamma": gamma, "seed": seed}
    optimizer = optim.ESAM(net.w.parameters(), SGD, lr=0.1, maximize=sign < 0, **own)  # type: ignore[arg-type]
    chosen = set()
    for t in range(6):
        w = torch.cat([p.detach() for p in net.w])
        drawn = torch.rand(4, generator=torch.Generator().manual_seed(seed + 1_000_003 * t)) < beta
        mask = drawn.repeat_interleave(3)
        g = (2 * net.a * (w - net.c)).mean(dim=0) * mask
        moved = w + (0.3 / beta * g / g.norm() if mask.any() else 0.0)
        rise = net.losses(moved) - net.losses(w)
        kept = rise.argsort(descending=True)[: int(gamma * 10)]
        expected = w - 0.1 * (2 * net.a * (moved - net.c))[kept].mean(dim=0)
        net.asked.clear()
        loss = optimizer.step(net.closure)
        if mask.any():  # else no loss rose, and any samples will do
            torch.testing.assert_close(torch.cat([p.detach() for p in net.w]), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss, sign * net.losses(w).mean())
        assert len(net.asked) == (2 if gamma == 1 else 3)
        chosen.add(tuple(drawn.tolist()))
    assert beta == 1 or len(chosen) > 1, "every step draws anew"


def test_samon_perturbs_normalisation_layers_alone(seed: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).to(DEVICE)
    optimizer = optim.SAMON(optim.norm_groups(net), SGD, rho=0.3, lr=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net(torch.randn(5, 4, device=DEVICE)).square().sum().backward()
    norm = torch.cat([net[1].weight.grad, net[1].bias.grad]).norm()
    optimizer.first_step()
    for n, p in net.named_parameters():
        moved = 0.3 * p.grad / norm if n.startswith("1.") else torch.zeros_like(p)  # type: ignore[operator]
        torch.testing.assert_close(p.detach(), before[n] + moved)
    optimizer.restore()
    with pytest.raises(ValueError, match="1 of 1 param groups are perturbed"):
        optim.SAMON(net.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="has no normalisation layer"):
        optim.norm_groups(nn.Linear(2, 2))


class LlamaRMSNorm(nn.Module):
    """As transformers has it; timm's RmsNorm is alike."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))


class ActNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.ones(1, channels, 1, 1)) for _ in range(2))


class NormedLinear(nn.Linear):
    pass


class PreNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.linear = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)


def test_samon_knows_normalisation_layers_of_other_libraries() -> None:
    net = nn.Sequential(LlamaRMSNorm(4), NormedLinear(4, 4), ActNorm2d(4), PreNormBlock(), nn.LayerNorm(4))
    norms, others = optim.norm_groups(net)
    names = {p: name for name, p in net.named_parameters()}
    assert [names[p] for p in norms["params"]] == ["0.weight", "2.scale", "2.shift", "4.weight", "4.bias"]
    assert len(others["params"]) == 5


def test_asam_by_the_released_rule(seed: int) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).to(DEVICE)
    optimizer = optim.ASAM(optim.adaptive_groups(net), SGD, rho=0.3, eta=0.0, lr=0.1)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    grads = {n: p.grad for n, p in net.named_parameters()}
    metric = {n: w.abs() if "weight" in n else torch.ones_like(w) for n, w in before.items()}
    norm = torch.stack([(metric[n] * grads[n]).square().sum() for n in before]).sum().sqrt()  # type: ignore[operator]
    optimizer.first_step()
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] + 0.3 * metric[n] ** 2 * grads[n] / norm)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        (optim.ASAM, {"eta": -1.0}, "eta is -1.0"),
        (optim.FisherSAM, {"eta": -1.0}, "eta is -1.0"),
        (optim.FriendlySAM, {"lam": 1.5}, "lam is 1.5"),
        (optim.WSAM, {"gamma": 1.0}, "gamma is 1.0"),
        (optim.ESAM, {"beta": 0.0}, "beta is 0.0"),
        (optim.ESAM, {"ascent_fraction": 0.5}, "needs ascent_fraction=1"),
        (optim.EigenSAM, {"interval": 0}, "interval is 0"),
        (optim.EigenSAM, {"scope": "local"}, "a checkpoint saves one"),
        (optim.MSAM, {}, "SGD has none here: set momentum above 0"),
        (optim.S2SAM, {"scope": "local"}, "it has no first pass to change"),
        (optim.S2SAM, {"check_second": False}, "its only gradient must be checked"),
        (optim.GSAM, {"ascent_interval": 2, "ascent_between": "reuse"}, "needs the first gradient of every step"),
    ],
    ids=str,
)
def test_bad_hyper_parameters(method: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method([nn.Parameter(torch.ones(2))], SGD, lr=0.1, **kwargs)
