"""The kernels' fused updates against torch's own optimizers, through the public optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, RMSprop

from lesam_dist import LESAM, SAM
from lesam_dist.optim.engine.triton_backend import TritonOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-2, "maximize": True}),
    "adamw": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw-betas": (AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "maximize": True}),
    # These are not fused: restored by the kernels, stepped by themselves.
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "amsgrad": (AdamW, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (RMSprop, {"lr": 1e-3}),
}

# float32, a few steps: the kernels use fma where torch multiplies and adds; AdamW divides by sqrt(v).
RTOL, ATOL = 2e-5, 2e-6


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 7)).to(DEVICE, dtype)


def fill_gradients(net: nn.Module, step: int, which: int) -> None:
    """Fresh gradients that are a function of (step, pass), so that two nets get the same."""
    generator = torch.Generator().manual_seed(1000 * step + which)
    for p in net.parameters():
        values = torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype)
        p.grad = values if p.grad is None else p.grad.copy_(values)


def take_steps(optimizer: LESAM | SAM, net: nn.Module, steps: range) -> None:
    for step in steps:
        fill_gradients(net, step, 0)
        optimizer.first_step(zero_grad=True)
        fill_gradients(net, step, 1)
        optimizer.second_step(zero_grad=True)


def assert_same(a: tuple[nn.Module, Any], b: tuple[nn.Module, Any]) -> None:
    torch.testing.assert_close(dict(a[0].named_parameters()), dict(b[0].named_parameters()), rtol=RTOL, atol=ATOL)
    first, second = (optimizer.state_dict()["state"] for _, optimizer in (a, b))
    # Of Adam's steps, torch's fused update keeps the count on the device, and its others on the CPU.
    torch.testing.assert_close(first, second, rtol=RTOL, atol=ATOL, check_device=False)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("base", BASES)
def test_kernels_and_torch_make_the_same_step_and_state(seed: int, base: str, alpha: float) -> None:
    cls, kwargs = BASES[base]
    net = make_net()
    twin = copy.deepcopy(net)
    fused = LESAM(net.parameters(), cls, alpha=alpha, backend="triton", **kwargs)
    plain = LESAM(twin.parameters(), cls, alpha=alpha, backend="reference", **kwargs)
    take_steps(fused, net, range(4))
    take_steps(plain, twin, range(4))
    assert_same((net, fused), (twin, plain))


@pytest.mark.parametrize("base", [SGD, AdamW], ids=lambda c: c.__name__)
def test_groups_share_one_launch_with_their_own_scalars(seed: int, base: type[torch.optim.Optimizer]) -> None:
    net = make_net()
    twin = copy.deepcopy(net)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        a, b, c, d = model.parameters()
        return [
            {"params": [a], "sigma": 0.05, "lr": 0.02},
            {"params": [b], "perturb": False, "weight_decay": 0.3},
            {"params": [c, d], "rho_max": 0.01, "plus_alpha": 0.4, "lr": 0.05},
        ]

    kwargs = {"lr": 0.1, "momentum": 0.9} if base is SGD else {"lr": 0.1}
    fused = LESAM(groups(net), base, backend="triton", **kwargs)
    plain = LESAM(groups(twin), base, backend="reference", **kwargs)
    take_steps(fused, net, range(3))
    take_steps(plain, twin, range(3))
    assert_same((net, fused), (twin, plain))
    assert fused.telemetry["rho"].item() == pytest.approx(plain.telemetry["rho"].item(), rel=1e-6)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_checkpoints_are_interchangeable_with_torch(seed: int, base: str) -> None:
    """A plain optimizer's state goes on in the kernels and back."""
    cls, kwargs = BASES[base]
    net = make_net()
    twin = copy.deepcopy(net)
    plain = cls(twin.parameters(), **kwargs)
    for step in range(2):
        fill_gradients(twin, step, 1)
        plain.step()
    net.load_state_dict(twin.state_dict())
    fused = SAM(net.parameters(), cls, rho=0.0, backend="triton", **kwargs)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    take_steps(fused, net, range(2, 4))
    for step in range(2, 4):
        fill_gradients(twin, step, 1)
        plain.step()
    assert_same((net, fused), (twin, plain))
    back = cls(twin.parameters(), **kwargs)
    back.load_state_dict(copy.deepcopy(fused.base_optimizer.state_dict()))
    twin.load_state_dict(net.state_dict())
    take_steps(fused, net, range(4, 5))
    fill_gradients(twin, 4, 1)
    back.step()
    assert_same((net, fused), (twin, back))


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_a_schedule_moves_scalars_and_nothing_else(seed: int, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """lr, sigma and rho_max change every step: the same device tensors are refilled, and no table is built anew."""
    cls, kwargs = BASES[base]
    net = make_net()
    twin = copy.deepcopy(net)
    fused = LESAM(net.parameters(), cls, backend="triton", **kwargs)
    plain = LESAM(twin.parameters(), cls, backend="reference", **kwargs)
    take_steps(fused, net, range(1))
    take_steps(plain, twin, range(1))
    ops = fused.weights.ops[0]
    assert isinstance(ops, TritonOps)
    addresses = ops._radii._tensor.data_ptr(), ops._scalars._tensor.data_ptr()  # type: ignore[union-attr]
    for step in range(1, 5):
        for optimizer in (fused, plain):
            group = optimizer.param_groups[0]
            group["lr"], group["sigma"], group["rho_max"] = 0.1 / (step + 1), 0.3 / step, 0.05 * step
        take_steps(fused, net, range(step, step + 1))
        take_steps(plain, twin, range(step, step + 1))
    assert_same((net, fused), (twin, plain))
    assert fused.weights.ops[0] is ops
    assert (ops._radii._tensor.data_ptr(), ops._scalars._tensor.data_ptr()) == addresses  # type: ignore[union-attr]


def test_push_scalars_is_all_that_a_replay_needs(seed: int) -> None:
    """What a CUDA graph does: the kernels of a step again, on the same tensors, with none of its Python."""
    net = make_net()
    twin = copy.deepcopy(net)
    kwargs = {"lr": 0.1, "momentum": 0.9}
    fused = LESAM(net.parameters(), SGD, backend="triton", static_grads=True, **kwargs)
    plain = LESAM(twin.parameters(), SGD, backend="reference", **kwargs)
    take_steps(fused, net, range(2))
    take_steps(plain, twin, range(2))
    ops, update = fused.weights.ops[0], None
    assert isinstance(ops, TritonOps)
    for optimizer in (fused, plain):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["sigma"] = 0.03, 0.05
    fused.push_scalars()
    import lesam_kernels

    fill_gradients(net, 2, 0)
    sum_sq = lesam_kernels.sum_sq(ops._table, "g", perturbed_only=True)
    lesam_kernels.perturb(ops._table, sum_sq, ops._radii._tensor)  # type: ignore[arg-type]
    fill_gradients(net, 2, 1)
    lesam_kernels.restore_sgd(ops._table, ops._scalars._tensor, found_inf=torch.zeros((), device=DEVICE))  # type: ignore[arg-type]
    take_steps(plain, twin, range(2, 3))
    assert update is None
    assert_same((net, fused), (twin, plain))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_static_gradients_stay_where_they_are(seed: int, backend: str) -> None:
    net = make_net()
    twin = copy.deepcopy(net)
    x, y = torch.randn(8, 5, device=DEVICE), torch.randint(0, 7, (8,), device=DEVICE)

    def closure(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return run

    static = LESAM(net.parameters(), SGD, backend=backend, static_grads=True, lr=0.1)  # type: ignore[arg-type]
    free = LESAM(twin.parameters(), SGD, backend=backend, lr=0.1)  # type: ignore[arg-type]
    static.step(closure(net))
    addresses = [p.grad.data_ptr() for p in net.parameters()]  # type: ignore[union-attr]
    free.step(closure(twin))
    for _ in range(3):
        static.step(closure(net))
        free.step(closure(twin))
    assert [p.grad.data_ptr() for p in net.parameters()] == addresses  # type: ignore[union-attr]
    assert all(p.grad is None for p in twin.parameters())
    torch.testing.assert_close(dict(net.named_parameters()), dict(twin.named_parameters()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_unchecked_second_gradient(seed: int, backend: str, base: str) -> None:
    """check_second=False trusts the second gradient; the first one's flag still skips the update."""
    cls, kwargs = BASES[base]
    net = make_net()
    optimizer = LESAM(net.parameters(), cls, backend=backend, check_second=False, **kwargs)  # type: ignore[arg-type]
    take_steps(optimizer, net, range(1))
    before = copy.deepcopy(net.state_dict())
    fill_gradients(net, 1, 0)
    next(net.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
    optimizer.first_step()
    fill_gradients(net, 1, 1)
    optimizer.second_step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert optimizer.telemetry["skipped"].item() == 1
    fill_gradients(net, 2, 0)
    optimizer.first_step()
    fill_gradients(net, 2, 1)
    next(net.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
    optimizer.second_step()
    assert optimizer.telemetry["skipped"].item() == 1
    assert next(net.parameters()).isnan().any()
