"""DDP on 2 and 3 processes, and FSDP2, give the numbers of one process and of the float64 Algorithm 1."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lesam_dist import LESAM, SAM
from lesam_dist.parallel import Distributed, wrap_ddp
from tests.distributed.processes import run
from tests.oracles import SGD64, AdamW64, Weights, algorithm_1

STEPS, BATCH = 4, 12  # 12 is divisible by 2 and 3: every rank then weighs the same
SIGMA, RHO_MAX = 0.05, 0.05

CASES: dict[str, dict[str, Any]] = {
    "lesam-sgd": {"cls": torch.optim.SGD, "kwargs": {"lr": 0.1, "momentum": 0.9}, "oracle": SGD64},
    "lesam-adamw": {"cls": torch.optim.AdamW, "kwargs": {"lr": 1e-2}, "oracle": AdamW64},
    "lesam-plus": {"cls": torch.optim.SGD, "kwargs": {"lr": 0.1}, "oracle": SGD64, "alpha": 0.5},
    "sam": {"cls": torch.optim.SGD, "kwargs": {"lr": 0.1, "momentum": 0.9}, "oracle": SGD64, "rho": 0.05},
}

# float32: an all-reduce adds in another order (a few roundings of 6e-8 a step); AdamW divides by sqrt(v), which
# turns the relative error of a gradient into that of an update. float64 shows that nothing else differs.
RTOL = {torch.float32: 2e-5, torch.float64: 1e-11}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1), nn.Linear(1, 3))


def make_problem(seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """float32 weights and data, so that float32 and float64 runs start from the same numbers."""
    torch.manual_seed(seed)
    net = make_net()
    return net.state_dict(), torch.randn(STEPS, BATCH, 6), torch.randint(0, 3, (STEPS, BATCH))


def make_optimizer(case: dict[str, Any], params: Any) -> LESAM | SAM:
    if "rho" in case:
        return SAM(params, case["cls"], rho=case["rho"], **case["kwargs"])
    return LESAM(params, case["cls"], sigma=SIGMA, rho_max=RHO_MAX, alpha=case.get("alpha", 0.0), **case["kwargs"])


def train(here: Distributed, seed: int, wrap: str) -> dict[tuple[str, torch.dtype], dict[str, Any]]:
    """Every case on this rank's part of each batch; the final weights, whole, and the radii."""
    state, x, y = make_problem(seed)
    part = slice(here.rank * BATCH // here.world_size, (here.rank + 1) * BATCH // here.world_size)
    results = {}
    for (name, case), dtype in itertools.product(CASES.items(), RTOL):
        net = make_net().to(dtype)
        net.load_state_dict(state)
        if wrap == "fsdp":
            mesh = init_device_mesh("cpu", (here.world_size,))
            model: nn.Module = fully_shard(net, mesh=mesh)  # type: ignore[assignment]
        else:
            model = wrap_ddp(net, here)
        optimizer = make_optimizer(case, net.parameters())
        radii = []
        for t in range(STEPS):

            def closure(t: int = t, model: nn.Module = model, dtype: torch.dtype = dtype) -> Tensor:
                loss = nn.functional.cross_entropy(model(x[t][part].to(dtype)), y[t][part])
                loss.backward()
                return loss

            optimizer.step(closure)
            radii.append(optimizer.telemetry["rho"].item())
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
        results[name, dtype] = {"radii": radii, "weights": {n: p.detach().numpy() for n, p in whole.items()}}
    return results


def expected(seed: int, name: str) -> tuple[Weights, list[float]]:
    state, x, y = make_problem(seed)
    net, case = make_net().double(), CASES[name]

    def gradient(w: Weights, t: int) -> Weights:
        params = {n: torch.tensor(value, requires_grad=True) for n, value in w.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(net, params, (x[t].double(),)), y[t])
        grads = torch.autograd.grad(loss, list(params.values()))
        return {n: g.numpy() for n, g in zip(params, grads, strict=True)}

    start = {n: value.double().numpy() for n, value in state.items()}
    base = case["oracle"](**case["kwargs"])
    sigma = 1e9 if "rho" in case else SIGMA
    cap = case.get("rho", RHO_MAX)
    return algorithm_1(
        start, gradient, base, steps=STEPS, sigma=lambda t: sigma, rho_max=cap, alpha=case.get("alpha", 0.0)
    )


@pytest.mark.parametrize(("wrap", "world_size"), [("ddp", 1), ("ddp", 2), ("ddp", 3), ("fsdp", 2)])
def test_any_number_of_processes_follows_algorithm_1(seed: int, wrap: str, world_size: int) -> None:
    if world_size == 1:
        ranks = [train(Distributed(0, 0, 1, torch.device("cpu")), seed, wrap)]
    else:
        ranks = run(train, world_size, seed, wrap)
    for name, dtype in itertools.product(CASES, RTOL):
        weights, radii = expected(seed, name)
        for rank in ranks:
            result, what = rank[name, dtype], f"{name} {dtype}"
            np.testing.assert_allclose(result["radii"], radii, rtol=1e-5, err_msg=what)
            for key, value in weights.items():
                actual, scale = result["weights"][key], np.abs(value).max()
                np.testing.assert_allclose(actual / scale, value / scale, rtol=0, atol=RTOL[dtype], err_msg=what)
                first = ranks[0][name, dtype]["weights"][key]
                assert np.array_equal(first, actual), f"{what} {key}: replicas drifted apart"


def overflow_on_one_rank(here: Distributed, seed: int) -> list[tuple[bool, float]]:
    return [step_with_overflow(here, seed, bad_pass) for bad_pass in (0, 1)]


def step_with_overflow(here: Distributed, seed: int, bad_pass: int) -> tuple[bool, float]:
    state, x, y = make_problem(seed)
    net = make_net()
    net.load_state_dict(state)
    model = wrap_ddp(net, here)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    calls = iter(range(2))

    def closure() -> Tensor:
        scale = float("inf") if next(calls) == bad_pass and here.rank == 1 else 1.0
        loss = nn.functional.cross_entropy(model(x[0]), y[0]) * scale
        loss.backward()
        return loss

    optimizer.step(closure)
    same = all(torch.equal(p, state[n]) for n, p in net.named_parameters())
    return same, optimizer.telemetry["skipped"].item()


def test_overflow_on_one_rank_skips_on_all(seed: int) -> None:
    assert run(overflow_on_one_rank, 2, seed) == 2 * [[(True, 1.0), (True, 1.0)]]
