"""Norms taken during backward on several processes: of reduced gradients, equal to the bit, and as without."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lesam_dist import LESAM
from lesam_dist.optim.engine import early_sums
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.parallel.hooks import other_buffer
from tests.parallel.processes import run
from tests.parallel.test_optimizers import BATCH, STEPS, make_net, make_problem

WRAPPINGS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "ddp": (2, "ddp", {}),
    "local": (2, "ddp", {"scope": "local"}),
    "fsdp": (2, "fsdp", {"wrap_classes": ["Linear"]}),
    "micro": (2, "fsdp", {}),
    "ddp3": (3, "ddp", {}),
    "hsdp": (4, "hsdp", {"shard_size": 2, "wrap_classes": ["Linear"]}),
    "replica": (4, "hsdp", {"shard_size": 2, "wrap_classes": ["Linear"], "scope": "replica"}),
}
FULL = ("ddp3", "hsdp", "replica")


class Branches(nn.Module):
    """Which layers have a gradient on a process depends on its rank; one has none on any."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unused = nn.Linear(6, 8), nn.Linear(3, 3)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](self.stem(x).tanh())  # type: ignore[no-any-return]


def whole(net: nn.Module) -> dict[str, Any]:
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
    return {n: p.detach().numpy().copy() for n, p in full.items()}


def train(world: Distributed, seed: int, name: str, early: bool, scaled: bool = False, **method: Any) -> dict[str, Any]:
    _, strategy, kwargs = WRAPPINGS[name]
    state, x, y = make_problem(seed)
    net = make_net().double()
    net.load_state_dict(state)
    model = ddp(net) if strategy == "ddp" else wrap(net, world, strategy, **kwargs)  # type: ignore[arg-type]
    scope = kwargs.get("scope", "global")
    options = {"scope": scope, "lr": 0.1, "max_grad_norm": 0.1, "norm_in_backward": early, **method}
    optimizer = LESAM(net.parameters(), torch.optim.SGD, **options)
    scaler = optimizer.grad_scaler = GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    if early and strategy == "ddp":
        optimizer.sum_buckets(model)  # type: ignore[arg-type]
    part = slice(world.rank * BATCH // world.world_size, (world.rank + 1) * BATCH // world.world_size)
    norms, was_early = [], []
    is_of = early_sums._Group.is_of

    def watched(group: Any, grads: Any) -> bool:
        was_early.append(is_of(group, grads))
        return was_early[-1]

    with mock.patch.object(early_sums._Group, "is_of", watched):
        for t in range(STEPS):
            micro = 2 if name == "micro" else 1
            images, labels = x[t][part].double(), y[t][part]
            optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), images, labels, None, scaler, micro))
            scaler.update()
            norms.append(optimizer.telemetry["grad_norm"].item())
    return {"weights": whole(net), "norms": norms, "early": was_early}


def ddp(net: nn.Module, **kwargs: Any) -> DistributedDataParallel:
    """With buckets so small that there are several."""
    return DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=1e-4, **kwargs)


def both(world: Distributed, seed: int, name: str, scaled: bool = False, **method: Any) -> list[dict[str, Any]]:
    with mock.patch.object(early_sums, "LEAST_BYTES", 1):
        return [train(world, seed, name, early, early and scaled, **method) for early in (False, True)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in FULL else n for n in WRAPPINGS])
def test_sums_are_of_reduced_gradients_and_none_is_left_in_the_step(seed: int, name: str) -> None:
    processes = WRAPPINGS[name][0]
    ranks = run(both, processes, seed, name)
    for plain, early in ranks:
        np.testing.assert_allclose(early["norms"], plain["norms"], rtol=1e-12)
        for n, value in plain["weights"].items():
            np.testing.assert_allclose(early["weights"][n], value, rtol=0, atol=1e-12 * np.abs(value).max())
            assert np.array_equal(early["weights"][n], ranks[0][1]["weights"][n]), "ranks drifted apart"
        if WRAPPINGS[name][2].get("scope", "global") == "global":
            assert early["norms"] == ranks[0][1]["norms"]
        groups = len(early["early"]) // (2 * STEPS)
        assert groups > 1
        by_pass = np.array(early["early"]).reshape(STEPS, 2, groups)
        expected = np.ones_like(by_pass)
        expected[0, 0] = False  # it came before the parameters were known
        if name == "local":
            expected[:, 0] = False  # DDP reduces nothing, and so tells of nothing
        assert np.array_equal(by_pass, expected)


def scaled(world: Distributed, seed: int) -> list[list[dict[str, Any]]]:
    return [both(world, seed, name, True, alpha=alpha) for name in ("ddp", "fsdp") for alpha in (0.0, 0.5)]


def test_a_loss_scale(seed: int) -> None:
    """Sums of scaled gradients; for LE-SAM+, which takes the scale off in DDP's buckets, new ones."""
    for pairs in run(scaled, 2, seed):
        for plain, early in pairs:
            np.testing.assert_allclose(early["norms"], plain["norms"], rtol=1e-12)
            for n, value in plain["weights"].items():
                np.testing.assert_allclose(early["weights"][n], value, rtol=0, atol=1e-12 * np.abs(value).max())
            assert any(early["early"])


def branch(world: Distributed, seed: int, early: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = Branches().double()
    x = torch.randn(STEPS, 4, 6, dtype=torch.float64) + world.rank
    model = ddp(net, find_unused_parameters=True)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, norm_in_backward=early)
    if early:
        optimizer.sum_buckets(model)
    norms = []
    for t in range(STEPS):

        def closure(t: int = t) -> Tensor:
            loss: Tensor = model(x[t], (world.rank + t // 2) % 2).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        norms.append(optimizer.telemetry["grad_norm"].item())
    return {"weights": whole(net), "norms": norms}


def branches(world: Distributed, seed: int) -> list[dict[str, Any]]:
    with mock.patch.object(early_sums, "LEAST_BYTES", 1):
        return [branch(world, seed, early) for early in (False, True)]


def test_gradients_that_only_another_process_has(seed: int) -> None:
    ranks = run(branches, 2, seed)
    for plain, early in ranks:
        np.testing.assert_allclose(early["norms"], plain["norms"], rtol=1e-12)
        assert early["norms"] == ranks[0][1]["norms"]
        for n, value in plain["weights"].items():
            np.testing.assert_allclose(early["weights"][n], value, rtol=0, atol=1e-12 * np.abs(value).max())
            assert np.array_equal(early["weights"][n], ranks[0][1]["weights"][n])


def compressed(world: Distributed, seed: int) -> list[list[float]]:
    """With a hook of the user's that gives DDP another buffer than the bucket's."""
    norms = []
    for early in (False, True):
        torch.manual_seed(seed)
        net = make_net()
        x = torch.randn(STEPS, 4, 6) + world.rank
        model = ddp(net)
        optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, norm_in_backward=early)
        if early:
            optimizer.sum_buckets(model, other_buffer)
        else:
            model.register_comm_hook(None, other_buffer)
        norms.append([])
        for t in range(STEPS):
            optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x[t], torch.tensor([0, 1, 2, 0])))
            norms[-1].append(optimizer.telemetry["grad_norm"].item())
    return norms


def test_hook_of_the_users(seed: int) -> None:
    ranks = run(compressed, 2, seed)
    for plain, early in ranks:
        np.testing.assert_allclose(early, plain, rtol=1e-6)
        assert early == ranks[0][1]


def refused(world: Distributed) -> list[str]:
    net = make_net()
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, norm_in_backward=True)
    with pytest.raises(RuntimeError) as unknown:
        optimizer.step(lambda: loss_of(net))
    with pytest.raises(ValueError, match="LESAM") as copies:
        optimizer.sum_buckets(DistributedDataParallel(net))
    return [str(unknown.value), str(copies.value)]


def loss_of(net: nn.Module) -> Tensor:
    loss: Tensor = net(torch.ones(2, 6)).sum()
    loss.backward()
    return loss


def test_refusals() -> None:
    for unknown, copies in run(refused, 2):
        assert "a parameter is whole on each of 2 processes" in unknown
        assert "Call optimizer.sum_buckets(model) before the first backward" in unknown
        assert "LESAM.sum_buckets: DDP would copy the gradients out of its buckets" in copies
