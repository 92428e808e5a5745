"""One state and one set of param groups with the base optimizer, through every round trip."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD

from lesam_dist import LESAM, SharpnessAware
from tests.optim.nets import DEVICE, make_closure, make_net, same, snapshot


def linked(optimizer: SharpnessAware) -> bool:
    optimizer.param_groups[0]["lr"] = 0.0123
    return (
        optimizer.base_optimizer.param_groups[0]["lr"] == 0.0123 and optimizer.base_optimizer.state is optimizer.state
    )


def test_groups_stay_shared_through_every_round_trip(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1, momentum=0.9)
    optimizer.step(make_closure(net))
    assert linked(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert linked(optimizer)
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    assert linked(optimizer)
    assert linked(pickle.loads(pickle.dumps(optimizer)))
    assert linked(copy.deepcopy(optimizer))
    extra = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer.add_param_group({"params": [extra], "sigma": 0.1})
    assert linked(optimizer)
    assert optimizer.base_optimizer.param_groups[1]["momentum"] == 0.9
    assert optimizer.param_groups[1]["rho_max"] == 0.2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_keeps_its_switches_and_its_scaler(seed: int, way: Callable[[Any], Any]) -> None:
    net = make_net()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    optimizer = LESAM(net.parameters(), SGD, lr=0.1)
    optimizer.enabled, optimizer.measure_rho, optimizer.grad_scaler = False, True, scaler
    twin, its_scaler = way((optimizer, scaler))
    assert (twin.enabled, twin.measure_rho) == (False, True)
    assert twin.grad_scaler is its_scaler
    alone = way(optimizer)
    assert alone.grad_scaler.get_scale() == 8.0, "or its closure's loss would be scaled and its gradients not unscaled"
    optimizer.load_state_dict(LESAM(net.parameters(), SGD, lr=0.1).state_dict())
    assert optimizer.enabled is False, "which no checkpoint holds"


def test_unpickled_optimizer_goes_on_identically(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1, momentum=0.9)
    optimizer.step(make_closure(net))
    twin_net, twin = copy.deepcopy((net, optimizer))
    rng = torch.get_rng_state()
    optimizer.step(make_closure(net))
    torch.set_rng_state(rng)
    twin.step(make_closure(twin_net))
    assert same(twin_net, snapshot(net))


def test_accelerate_round_trip_and_scheduler(seed: int) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=DEVICE == "cpu")
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    _, prepared, _ = accelerator.prepare(net, optimizer, scheduler)
    assert prepared.optimizer is optimizer
    optimizer.step(make_closure(net))
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert linked(optimizer)


@pytest.mark.filterwarnings("error")
def test_lr_scheduler_does_not_warn_in_a_hand_written_loop(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    closure = make_closure(net)
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step(zero_grad=True)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_state_is_interchangeable_with_the_plain_optimizer(seed: int) -> None:
    net = make_net()
    optimizer = LESAM(net.parameters(), SGD, lr=0.1, momentum=0.9)
    optimizer.step(make_closure(net))
    plain = SGD(net.parameters(), lr=1.0, momentum=0.1)
    plain.load_state_dict(optimizer.base_optimizer.state_dict())
    assert plain.param_groups[0]["momentum"] == 0.9
    for p in net.parameters():
        assert torch.equal(plain.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    fresh = LESAM(net.parameters(), SGD, lr=0.1, momentum=0.9, sigma=0.7)
    fresh.load_state_dict(SGD(net.parameters(), lr=0.5, momentum=0.8).state_dict())
    assert fresh.param_groups[0]["lr"] == 0.5
    assert fresh.param_groups[0]["sigma"] == 0.7


@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("steps", [0, 2])
def test_distributed_checkpoint_state_dict(seed: int, base: type[torch.optim.Optimizer], steps: int) -> None:
    """It calls step(closure=None) with zero gradients on a fresh optimizer; nothing may move or be counted."""
    kwargs = {"lr": 0.1, "momentum": 0.9} if base is SGD else {"lr": 0.1}
    net = make_net()
    optimizer = LESAM(net.parameters(), base, **kwargs)
    for _ in range(steps):
        optimizer.step(make_closure(net))
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))  # else both share their buffers
    twin_net = copy.deepcopy(net)
    twin = LESAM(twin_net.parameters(), base, **kwargs)
    before = snapshot(twin_net)
    set_optimizer_state_dict(twin_net, twin, saved)
    assert same(twin_net, before)
    if base is not SGD:
        assert all(state["step"].item() == steps for state in twin.state.values())
    rng = torch.get_rng_state()
    optimizer.step(make_closure(net))
    torch.set_rng_state(rng)
    twin.step(make_closure(twin_net))
    assert same(twin_net, snapshot(net))
