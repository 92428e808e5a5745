"""`lesam_dist.compat.davda54` runs scripts for davda54/sam: its rule in float64, both of its loops, its files."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import lesam_dist
from lesam_dist.compat.davda54 import SAM, disable_running_stats, enable_running_stats

Batch = tuple[Tensor, Tensor]
STEPS = 4


def problem() -> tuple[nn.Module, list[Batch]]:
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return net, [(torch.randn(16, 6).double(), torch.randint(3, (16,))) for _ in range(STEPS)]


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def by_formula(net: nn.Module, batches: list[Batch], base: Any, rho: float, adaptive: bool, **kwargs: Any) -> None:
    """w_hat = w + rho T^2 g / ||T g|| and a step of torch's own optimizer with the gradient there."""
    params = list(net.parameters())
    optimizer = base(params, foreach=False, **kwargs)
    for batch in batches:
        grads = torch.autograd.grad(loss_of(net, batch), params)
        scale = [p.detach().abs() if adaptive else torch.ones_like(p) for p in params]
        norm = torch.cat([(t * g).flatten() for t, g in zip(scale, grads, strict=True)]).norm()
        exact = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, t, g in zip(params, scale, grads, strict=True):
                p += rho * t**2 * g / norm
        second = torch.autograd.grad(loss_of(net, batch), params)
        with torch.no_grad():
            for p, w, g in zip(params, exact, second, strict=True):
                p.copy_(w)
                p.grad = g
        optimizer.step()


def two_steps(net: nn.Module, batches: list[Batch], optimizer: Any) -> None:
    for batch in batches:
        loss_of(net, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(net, batch).backward()
        optimizer.second_step(zero_grad=True)


def with_closure(net: nn.Module, batches: list[Batch], optimizer: Any) -> None:
    """As that package's README has it: the first pass, then a closure that is the second."""
    for batch in batches:

        def closure(batch: Batch = batch) -> Tensor:
            loss = loss_of(net, batch)
            loss.backward()
            return loss

        loss_of(net, batch).backward()
        optimizer.step(closure)
        optimizer.zero_grad()


@pytest.mark.parametrize("loop", [two_steps, with_closure])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("base", "kwargs"), [(SGD, {"lr": 0.1, "momentum": 0.9}), (AdamW, {"lr": 0.01})])
def test_its_loops_make_its_steps(seed: int, loop: Any, adaptive: bool, base: Any, kwargs: dict[str, Any]) -> None:
    net, batches = problem()
    twin = copy.deepcopy(net)
    loop(net, batches, SAM(net.parameters(), base, rho=0.5, adaptive=adaptive, **kwargs))
    by_formula(twin, batches, base, 0.5, adaptive, **kwargs)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_arguments_go_by_position_as_there(seed: int) -> None:
    net, _ = problem()
    (group,) = SAM(net.parameters(), SGD, 0.3, True, lr=0.1).param_groups
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.3, True, 0.1)
    groups = [{"params": [net[0].weight], "adaptive": True}, {"params": [net[0].bias], "rho": 0.1}]
    first, second = SAM(groups, SGD, lr=0.1).param_groups
    assert (first["adaptive"], first["rho"], second["adaptive"], second["rho"]) == (True, 0.05, False, 0.1)


def test_a_closure_without_a_first_pass_is_refused_and_one_that_fails_leaves_the_weights(seed: int) -> None:
    net, batches = problem()
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"call loss\.backward\(\) before"):
        optimizer.step(lambda: loss_of(net, batches[0]).backward())

    def fails() -> None:
        assert not all(map(torch.equal, net.parameters(), before)), "the weights are perturbed here"
        raise ZeroDivisionError

    loss_of(net, batches[0]).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    assert all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_its_checkpoints_load(seed: int, base: Any) -> None:
    """They hold a copy of the weights for each parameter, its settings, and nothing of the base optimizer."""
    net, batches = problem()
    theirs = base(net.parameters(), lr=0.07)
    params = list(net.parameters())
    checkpoint = {
        "state": {i: {"old_p": torch.randn_like(p)} for i, p in enumerate(params)},
        "param_groups": [
            {**theirs.state_dict()["param_groups"][0], "rho": 0.4, "adaptive": True},
        ],
    }
    optimizer, twin = SAM(net.parameters(), base, lr=0.1), copy.deepcopy(net)
    with pytest.warns(UserWarning, match="momenta begin anew"):
        optimizer.load_state_dict(checkpoint)
    two_steps(net, batches, optimizer)
    by_formula(twin, batches, base, 0.4, adaptive=True, lr=0.07)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert all("old_p" in own for own in checkpoint["state"].values()), "what is loaded stays as it was"
    with pytest.raises(ValueError, match=r"adaptive=True, which SAM would go on without"):
        lesam_dist.SAM(net.parameters(), base, lr=0.1).load_state_dict(checkpoint)

    resumed = SAM(net.parameters(), base, lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["rho"] == 0.4


def test_statistics_stand_still_however_often_they_are_stopped(seed: int) -> None:
    """And a cumulative average counts first passes alone."""
    net = nn.Sequential(
        nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)
    )
    batches = torch.randn(3, 32, 4)
    for batch in batches:
        enable_running_stats(net)
        enable_running_stats(net)
        net(batch)
        disable_running_stats(net)
        disable_running_stats(net)
        net(batch + 5)
    enable_running_stats(net)
    torch.testing.assert_close(net[0].running_mean, batches.mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)
    assert [layer.track_running_stats for layer in net] == [True, True, False]
    assert net[1].momentum == 0.1
    assert net[0].num_batches_tracked == 3
