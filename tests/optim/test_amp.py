"""Loss scaling with torch's GradScaler: the numbers of the unscaled run, and an overflow in either pass is survived."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from lesam_dist import ASAM, LESAM
from lesam_dist.optim.engine.base import SharpnessAware

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
SCALE = 2.0**10


def make(backend: str, scale: float = SCALE) -> tuple[nn.Module, LESAM, GradScaler]:
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(DEVICE)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, backend=backend, lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    return net, optimizer, GradScaler(DEVICE, init_scale=scale, growth_interval=1000)


def make_closure(net: nn.Module, scaler: GradScaler | None, bad_pass: int | None = None) -> Callable[[], Tensor]:
    x, y = torch.randn(8, 5).to(DEVICE), torch.randint(0, 3, (8,)).to(DEVICE)  # `torch.set_rng_state` is the CPU's
    calls = iter(range(100))

    def run() -> Tensor:
        loss = nn.functional.cross_entropy(net(x), y)
        scaled = loss if scaler is None else scaler.scale(loss)
        (scaled * float("inf") if next(calls) == bad_pass else scaled).backward()
        return loss

    return run


def step_explicitly(optimizer: LESAM, scaler: GradScaler, closure: Callable[[], Tensor]) -> None:
    optimizer.grad_scaler = scaler
    optimizer.step(closure)
    scaler.update()


def step_by_scaler(optimizer: LESAM, scaler: GradScaler, closure: Callable[[], Tensor]) -> None:
    optimizer.grad_scaler = scaler
    scaler.step(optimizer, closure)
    scaler.update()


def step_by_accelerate(optimizer: LESAM, scaler: GradScaler, closure: Callable[[], Tensor]) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=DEVICE == "cpu")  # it keeps its state globally
    optimizer.grad_scaler = scaler
    AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler).step(closure)


def step_by_hand(optimizer: LESAM, scaler: GradScaler, closure: Callable[[], Tensor]) -> None:
    optimizer.zero_grad()
    closure()
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True)
    closure()
    scaler.unscale_(optimizer.base_optimizer)
    optimizer.second_step(zero_grad=True)
    scaler.update()


WAYS = [step_explicitly, step_by_scaler, step_by_accelerate, step_by_hand]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_steps_equal_unscaled_ones(seed: int, backend: str, way: Callable[..., None]) -> None:
    """LE-SAM's radius is not invariant to the loss scale: unscaling must come before it."""
    net, optimizer, scaler = make(backend)
    twin = copy.deepcopy(net)
    plain = LESAM(twin.parameters(), torch.optim.SGD, backend="reference", lr=0.1, momentum=0.9)
    for _ in range(3):
        rng = torch.get_rng_state()
        way(optimizer, scaler, make_closure(net, scaler))
        torch.set_rng_state(rng)
        plain.step(make_closure(twin, None))
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert optimizer.telemetry["rho"].item() == pytest.approx(plain.telemetry["rho"].item(), rel=1e-5)
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_skips_restores_and_halves_once(
    seed: int, backend: str, way: Callable[..., None], bad_pass: int
) -> None:
    net, optimizer, scaler = make(backend)
    way(optimizer, scaler, make_closure(net, scaler))
    before = copy.deepcopy(net.state_dict())
    way(optimizer, scaler, make_closure(net, scaler, bad_pass))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert scaler.get_scale() == SCALE / 2
    assert optimizer.telemetry["skipped"].item() == 1
    way(optimizer, scaler, make_closure(net, scaler))
    assert not torch.equal(net[0].weight, before["0.weight"])
    assert scaler.get_scale() == SCALE / 2


def test_an_unknown_scaler_is_an_error(seed: int) -> None:
    net, optimizer, scaler = make("reference")
    before = copy.deepcopy(net.state_dict())
    closure = make_closure(net, scaler)
    closure()
    with pytest.raises(RuntimeError, match=r"optimizer\.grad_scaler = scaler"):
        scaler.step(optimizer, closure)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


class Linear(nn.Module):
    """A loss whose gradient with regard to the weights is exactly what they are multiplied by."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(300, device=DEVICE, dtype=dtype))
        self.c = 1 + torch.randint(0, 64, (300,), device=DEVICE).to(dtype) / 64

    def closure(self, scaler: GradScaler | None = None, factor: float = 1.0) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = factor * (self.w * self.c).sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        return run


METHODS: dict[str, Callable[..., SharpnessAware]] = {
    "lesam": lambda params, **kwargs: LESAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, **kwargs),
    "lesam+": lambda params, **kwargs: LESAM(params, torch.optim.SGD, lr=0.1, alpha=0.5, **kwargs),
    "asam": lambda params, **kwargs: ASAM(params, torch.optim.AdamW, lr=0.1, **kwargs),
}


F32, F16 = torch.float32, torch.float16
POWER, OTHER = 8.0, 1000.0


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        *((name, F32, scale) for name in METHODS for scale in (POWER, OTHER)),
        ("lesam", F16, POWER),
        ("asam", F16, POWER),
    ],
)
def test_gradients_that_stay_scaled_make_the_same_step(seed: int, name: str, dtype: torch.dtype, scale: float) -> None:
    """Bit for bit where the scale is a power of two, also with float16 weights, which torch's scaler refuses."""
    net = Linear(dtype)
    twin = copy.deepcopy(net)
    plain, scaled = (METHODS[name](n.parameters(), backend="triton") for n in (net, twin))
    scaler = scaled.grad_scaler = GradScaler(DEVICE, init_scale=scale)
    for _ in range(3):
        plain.step(net.closure())
        scaled.step(twin.closure(scaler))
        scaler.update()
    close = {"rtol": 0, "atol": 0} if scale == POWER else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(twin.state_dict(), net.state_dict(), **close)
    for key in ("grad_norm", "rho"):
        torch.testing.assert_close(scaled.telemetry[key], plain.telemetry[key], **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [1.0, 1e6])
def test_clipping_is_by_the_true_norm(seed: int, norm: float, backend: str) -> None:
    net = Linear(torch.float32)
    twin = copy.deepcopy(net)
    plain, scaled = (METHODS["lesam"](n.parameters(), backend=backend, max_grad_norm=norm) for n in (net, twin))
    scaler = scaled.grad_scaler = GradScaler(DEVICE, init_scale=SCALE)
    for _ in range(2):
        plain.step(net.closure())
        scaled.step(twin.closure(scaler))
        scaler.update()
    torch.testing.assert_close(twin.state_dict(), net.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_of_the_second_pass_is_seen_without_its_check(seed: int, backend: str) -> None:
    """Else the weights would be lost, as the scaler's own check is not made either."""
    net = Linear(torch.float32)
    optimizer = METHODS["lesam"](net.parameters(), backend=backend, check_second=False)
    scaler = optimizer.grad_scaler = GradScaler(DEVICE, init_scale=SCALE)
    before = net.w.detach().clone()
    calls = iter((1.0, float("inf")))
    optimizer.step(lambda: net.closure(scaler, next(calls))())
    scaler.update()
    assert torch.equal(net.w, before)
    assert scaler.get_scale() == SCALE / 2


def test_float16_gradients_are_not_unscaled(seed: int) -> None:
    net = Linear(torch.float16)
    optimizer = METHODS["lesam"](net.parameters(), backend="reference")
    scaler = optimizer.grad_scaler = GradScaler(DEVICE, init_scale=SCALE)
    before = net.w.detach().clone()
    with pytest.raises(ValueError, match="a gradient is float16"):
        optimizer.step(net.closure(scaler))
    assert torch.equal(net.w, before)
    assert not optimizer.is_perturbed


class BrokenError(Exception):
    """What a closure raises."""


def breaking(closure: Callable[[], Tensor], bad_pass: int) -> Callable[[], Tensor]:
    """A closure whose passes are made, and which raises in one of them."""
    calls = iter(range(100))

    def run() -> Tensor:
        loss = closure()
        if next(calls) == bad_pass:
            raise BrokenError
        return loss

    return run


@pytest.mark.parametrize("updates", [True, False])
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("way", [step_explicitly, step_by_scaler])
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_catches_an_exception_may_update_the_scaler_or_not(
    seed: int, backend: str, way: Callable[..., None], bad_pass: int, updates: bool
) -> None:
    """Two steps fail; either way the next ones are those of the unscaled run, and the scale is as it was."""
    net, optimizer, scaler = make(backend)
    twin = copy.deepcopy(net)
    plain = LESAM(twin.parameters(), torch.optim.SGD, backend=backend, lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    for _ in range(2):
        rng = torch.get_rng_state()
        for _ in range(2):
            with pytest.raises(BrokenError):
                way(optimizer, scaler, breaking(make_closure(net, scaler), bad_pass))
            if updates:
                scaler.update()
            torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)
        torch.set_rng_state(rng)
        way(optimizer, scaler, make_closure(net, scaler))
        torch.set_rng_state(rng)
        plain.step(make_closure(twin, None))
        torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize("updates", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_before_an_exception_is_told(seed: int, backend: str, updates: bool) -> None:
    """In the first pass, where the second raises; not again by a step that fails before it has looked at a gradient."""
    net, optimizer, scaler = make(backend)
    optimizer.grad_scaler = scaler
    with pytest.raises(BrokenError):
        optimizer.step(breaking(make_closure(net, scaler, bad_pass=0), 1))
    if updates:
        scaler.update()
        assert scaler.get_scale() == SCALE / 2
    optimizer.step(make_closure(net, scaler))
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    optimizer.step(make_closure(net, scaler, bad_pass=0))
    scaler.update()
    with pytest.raises(BrokenError):
        optimizer.step(breaking(make_closure(net, scaler), 0))
    scaler.update()
    assert scaler.get_scale() == SCALE / 4


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_closures_make_the_unscaled_step(seed: int, backend: str, name: str) -> None:
    """m-sharpness, bit for bit; an overflow in any pass skips the step and halves the scale once."""
    net, _, scaler = make(backend)
    twin = copy.deepcopy(net)
    plain, scaled = (METHODS[name](n.parameters(), backend=backend) for n in (net, twin))
    scaled.grad_scaler = scaler
    for _ in range(3):
        rng = torch.get_rng_state()
        plain.step([make_closure(net, None) for _ in range(3)])
        torch.set_rng_state(rng)
        scaled.step([make_closure(twin, scaler) for _ in range(3)])
        scaler.update()
        torch.testing.assert_close(twin.state_dict(), net.state_dict(), rtol=0, atol=0)
        for key in ("loss", "perturbed_loss", "grad_norm", "rho"):
            torch.testing.assert_close(scaled.telemetry[key], plain.telemetry[key], rtol=0, atol=0)
    for index in range(6):
        bad = [index % 2 if closure == index // 2 else None for closure in range(3)]
        scaled.step([make_closure(twin, scaler, bad_pass) for bad_pass in bad])
        scaler.update()
        torch.testing.assert_close(twin.state_dict(), net.state_dict(), rtol=0, atol=0)
        assert scaler.get_scale() == SCALE / 2 ** (index + 1)
    with pytest.raises(BrokenError):
        scaled.step([make_closure(twin, scaler, bad_pass=1), breaking(make_closure(twin, scaler), 0)])
    scaler.update()
    torch.testing.assert_close(twin.state_dict(), net.state_dict(), rtol=0, atol=0)
