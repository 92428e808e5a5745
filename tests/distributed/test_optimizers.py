"""DDP on 2 and 3 processes, and FSDP2, give the numbers of one process and of the float64 Algorithm 1."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lesam_dist import LESAM, SAM
from lesam_dist.parallel import Distributed
from lesam_dist.train.passes import BatchPasses
from lesam_dist.wrapping import wrap
from tests.distributed.hooks import counting_hook
from tests.distributed.processes import run
from tests.oracles import SGD64, AdamW64, Weights, algorithm_1

STEPS, BATCH = 4, 12  # divisible by 2, 3 and 4: every rank then weighs the same
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
SETTINGS = [("reference", torch.float32), ("reference", torch.float64), ("triton", torch.float32)]

# What `wrap` is asked for, by the number of processes. The last layers have fewer rows than processes: empty shards.
STRATEGIES = {
    "single": (1, "ddp", {}),
    "ddp2": (2, "ddp", {}),
    "ddp3": (3, "ddp", {}),
    "fsdp2": (2, "fsdp", {}),
    "fsdp3": (3, "fsdp", {"reshard_after_forward": False}),
    "fsdp4": (4, "fsdp", {"wrap_classes": ["Linear"]}),
    "hsdp2x2": (4, "hsdp", {"shard_size": 2, "wrap_classes": ["Linear"]}),
}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1), nn.Linear(1, 3))


def make_problem(seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """float32 weights and data, so that float32 and float64 runs start from the same numbers."""
    torch.manual_seed(seed)
    net = make_net()
    return net.state_dict(), torch.randn(STEPS, BATCH, 6), torch.randint(0, 3, (STEPS, BATCH))


def make_optimizer(case: dict[str, Any], params: Any, backend: Any) -> LESAM | SAM:
    kwargs = {"backend": backend, **case["kwargs"]}
    if "rho" in case:
        return SAM(params, case["cls"], rho=case["rho"], **kwargs)
    return LESAM(params, case["cls"], sigma=SIGMA, rho_max=RHO_MAX, alpha=case.get("alpha", 0.0), **kwargs)


def train(here: Distributed, seed: int, how: str) -> dict[tuple[str, tuple[str, torch.dtype]], dict[str, Any]]:
    """Every case on this rank's part of each batch; the final weights, whole, and the radii."""
    state, x, y = make_problem(seed)
    part = slice(here.rank * BATCH // here.world_size, (here.rank + 1) * BATCH // here.world_size)
    results = {}
    _, strategy, options = STRATEGIES[how]
    for (name, case), (backend, dtype) in itertools.product(CASES.items(), SETTINGS):
        net = make_net().to(dtype)
        net.load_state_dict(state)
        model = wrap(net, here, strategy, **options)  # type: ignore[arg-type]
        optimizer = make_optimizer(case, net.parameters(), backend)
        radii = []
        for t in range(STEPS):

            def closure(t: int = t, model: nn.Module = model, dtype: torch.dtype = dtype) -> Tensor:
                loss = nn.functional.cross_entropy(model(x[t][part].to(dtype)), y[t][part])
                loss.backward()
                return loss

            optimizer.step(closure)
            radii.append(optimizer.telemetry["rho"].item())
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
        steps = [state["step"].item() for state in optimizer.state.values() if "step" in state]
        weights = {n: p.detach().numpy() for n, p in whole.items()}
        results[name, (backend, dtype)] = {"radii": radii, "weights": weights, "steps": steps}
    return results


def gradient_of(net: nn.Module, w: Weights, x: Tensor, y: Tensor) -> Weights:
    params = {n: torch.tensor(value, requires_grad=True) for n, value in w.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(net, params, (x.double(),)), y)
    grads = torch.autograd.grad(loss, list(params.values()))
    return {n: g.numpy() for n, g in zip(params, grads, strict=True)}


def expected(seed: int, name: str) -> tuple[Weights, list[float]]:
    state, x, y = make_problem(seed)
    net, case = make_net().double(), CASES[name]

    def gradient(w: Weights, t: int) -> Weights:
        return gradient_of(net, w, x[t], y[t])

    start = {n: value.double().numpy() for n, value in state.items()}
    base = case["oracle"](**case["kwargs"])
    sigma = 1e9 if "rho" in case else SIGMA
    cap = case.get("rho", RHO_MAX)
    return algorithm_1(
        start, gradient, base, steps=STEPS, sigma=lambda t: sigma, rho_max=cap, alpha=case.get("alpha", 0.0)
    )


@pytest.mark.parametrize("how", STRATEGIES)
def test_any_number_of_processes_follows_algorithm_1(seed: int, how: str) -> None:
    world_size = STRATEGIES[how][0]
    if world_size == 1:
        ranks = [train(Distributed(0, 0, 1, torch.device("cpu")), seed, how)]
    else:
        ranks = run(train, world_size, seed, how)
    for name, (backend, dtype) in itertools.product(CASES, SETTINGS):
        weights, radii = expected(seed, name)
        for rank in ranks:
            result, what = rank[name, (backend, dtype)], f"{name} {backend} {dtype}"
            np.testing.assert_allclose(result["radii"], radii, rtol=1e-5, err_msg=what)
            if name == "lesam-adamw":
                assert result["steps"] == [STEPS] * len(weights), "empty shards count their steps too"
            for key, value in weights.items():
                actual, scale = result["weights"][key], np.abs(value).max()
                np.testing.assert_allclose(actual / scale, value / scale, rtol=0, atol=RTOL[dtype], err_msg=what)
                first = ranks[0][name, (backend, dtype)]["weights"][key]
                assert np.array_equal(first, actual), f"{what} {key}: replicas drifted apart"


def overflow_on_one_rank(here: Distributed, seed: int) -> list[tuple[bool, float]]:
    return [step_with_overflow(here, seed, bad_pass) for bad_pass in (0, 1)]


def step_with_overflow(here: Distributed, seed: int, bad_pass: int) -> tuple[bool, float]:
    state, x, y = make_problem(seed)
    net = make_net()
    net.load_state_dict(state)
    model = wrap(net, here, "ddp")
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


def local_scope(here: Distributed, seed: int) -> dict[str, Any]:
    """Per-rank perturbations under DDP; also the gradient reductions of a step, and an overflow on one rank."""
    state, x, y = make_problem(seed)
    part = slice(here.rank * BATCH // here.world_size, (here.rank + 1) * BATCH // here.world_size)
    net = make_net().double()
    net.load_state_dict(state)
    model = wrap(net, here, "ddp")
    reductions: list[int] = []
    model.register_comm_hook(reductions, counting_hook)  # type: ignore[operator]
    kwargs: dict[str, Any] = {"sigma": SIGMA, "rho_max": None, "lr": 0.1, "momentum": 0.9}
    optimizer = LESAM(net.parameters(), torch.optim.SGD, scope="local", **kwargs)
    radii = []
    for t in range(STEPS):
        optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x[t][part].double(), y[t][part]))
        radii.append(optimizer.telemetry["rho"].item())
    before = {n: p.detach().numpy().copy() for n, p in net.named_parameters()}
    bad = x[0][part].double() * (float("nan") if here.rank == 1 else 1.0)

    def closure(sync: bool = True) -> Tensor:
        return BatchPasses(model, nn.CrossEntropyLoss(), x[0][part].double() if sync else bad, y[0][part])(sync=sync)

    optimizer.step(closure)
    same = all(np.array_equal(p.detach().numpy(), before[n]) for n, p in net.named_parameters())
    skipped = optimizer.telemetry["skipped"].item()
    return {"weights": before, "radii": radii, "reductions": len(reductions), "skip": (same, skipped)}


def test_local_scope_perturbs_each_rank_by_its_own_gradient(seed: int) -> None:
    """Against a float64 oracle of m-sharpness: per-rank g and w_hat, averaged g_hat; one gradient reduction a step."""
    world_size = 3
    state, x, y = make_problem(seed)
    net = make_net().double()
    w = {n: value.double().numpy() for n, value in state.items()}
    base, radii = SGD64(lr=0.1, momentum=0.9), []
    for t in range(STEPS):
        g_hats, radii_t = [], []
        for part in np.array_split(np.arange(BATCH), world_size):
            g = gradient_of(net, w, x[t][part], y[t][part])
            norm = np.sqrt(sum(float((v**2).sum()) for v in g.values()))
            g_hats.append(gradient_of(net, {n: w[n] + SIGMA * g[n] / norm**2 for n in w}, x[t][part], y[t][part]))
            radii_t.append(SIGMA / norm)
        base(w, {n: sum(g[n] for g in g_hats) / world_size for n in w})
        radii.append(radii_t)
    for rank, result in enumerate(run(local_scope, world_size, seed)):
        np.testing.assert_allclose(result["radii"], [r[rank] for r in radii], rtol=1e-9)
        for n, value in w.items():
            np.testing.assert_allclose(result["weights"][n], value, rtol=0, atol=1e-11 * np.abs(value).max())
        assert result["reductions"] == STEPS + 1
        assert result["skip"] == (True, 1.0), "one rank's overflow must skip the update on all"


def local_and_sharded(here: Distributed) -> str:
    net = wrap(make_net(), here, "fsdp")
    optimizer = LESAM(net.parameters(), torch.optim.SGD, scope="local", lr=0.1)
    with pytest.raises(RuntimeError) as error:
        optimizer.step(lambda sync: net(torch.randn(2, 6)).sum().backward())
    return str(error.value)


def test_local_scope_cannot_be_sharded() -> None:
    for message in run(local_and_sharded, 2):
        assert "scope='local'" in message
        assert "DDP" in message
