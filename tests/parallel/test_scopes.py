"""What a perturbation is made of, local, global or one replica's gradients, and an overflow on one rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lesam_dist import LESAM, optim
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.replicas import Sync
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.methods import CASES
from tests.oracles import SGD64, Weights, largest, norm_of
from tests.parallel.hooks import counting_average
from tests.parallel.processes import run
from tests.parallel.test_optimizers import BATCH, SIGMA, STEPS, gradient_of, make_net, make_problem


def overflow_on_one_rank(world: Distributed, seed: int) -> list[tuple[bool, float]]:
    return [step_with_overflow(world, seed, bad_pass) for bad_pass in (0, 1)]


def step_with_overflow(world: Distributed, seed: int, bad_pass: int) -> tuple[bool, float]:
    state, x, y = make_problem(seed)
    net = make_net()
    net.load_state_dict(state)
    model = wrap(net, world, "ddp")
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    calls = iter(range(2))

    def closure() -> Tensor:
        scale = float("inf") if next(calls) == bad_pass and world.rank == 1 else 1.0
        loss = nn.functional.cross_entropy(model(x[0]), y[0]) * scale
        loss.backward()
        return loss

    optimizer.step(closure)
    same = all(torch.equal(p, state[n]) for n, p in net.named_parameters())
    return same, optimizer.telemetry["skipped"].item()


def test_overflow_on_one_rank_skips_on_all(seed: int) -> None:
    assert run(overflow_on_one_rank, 2, seed) == 2 * [[(True, 1.0), (True, 1.0)]]


def part_of(world: Distributed) -> slice:
    return slice(world.rank * BATCH // world.world_size, (world.rank + 1) * BATCH // world.world_size)


def own_perturbations(world: Distributed, seed: int, scope: Any) -> dict[str, Any]:
    """The weights and radii of a scope that is not global; also the reductions, and an overflow on the last rank."""
    state, x, y = make_problem(seed)
    part = part_of(world)
    net = make_net().double()
    net.load_state_dict(state)
    reductions: list[int] = []
    if scope == "local":
        with mock.patch("lesam_dist.parallel.wrapping.average_each", counting_average(reductions)):
            model = wrap(net, world, "ddp")
    else:
        model = wrap(net, world, "hsdp", shard_size=2, wrap_classes=["Linear"], scope="replica")
    kwargs: dict[str, Any] = {"sigma": SIGMA, "rho_max": None, "lr": 0.1, "momentum": 0.9}
    optimizer = LESAM(net.parameters(), torch.optim.SGD, scope=scope, **kwargs)
    radii = []
    for t in range(STEPS):
        optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x[t][part].double(), y[t][part]))
        radii.append(optimizer.telemetry["rho"].item())
    before = whole(net)
    bad = x[0][part].double() * (float("nan") if world.rank == world.world_size - 1 else 1.0)

    def closure(sync: Sync = True) -> Tensor:
        images = x[0][part].double() if sync is True else bad
        return BatchPasses(model, nn.CrossEntropyLoss(), images, y[0][part])(sync=sync)

    optimizer.step(closure)
    same = all(np.array_equal(value, before[n]) for n, value in whole(net).items())
    skipped = optimizer.telemetry["skipped"].item()
    return {"weights": before, "radii": radii, "reductions": len(reductions), "skip": (same, skipped)}


def whole(net: nn.Module) -> Weights:
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
    return {n: p.detach().numpy().copy() for n, p in full.items()}


@pytest.mark.parametrize(("scope", "world_size", "perturbations"), [("local", 3, 3), ("replica", 4, 2)])
def test_every_process_or_replica_perturbs_by_its_own_gradient(
    seed: int, scope: str, world_size: int, perturbations: int
) -> None:
    """Against a float64 oracle of m-sharpness: own g and w_hat, averaged g_hat."""
    state, x, y = make_problem(seed)
    net = make_net().double()
    w = {n: value.double().numpy() for n, value in state.items()}
    base, radii = SGD64(lr=0.1, momentum=0.9), []
    for t in range(STEPS):
        g_hats, radii_t = [], []
        for part in np.array_split(np.arange(BATCH), perturbations):
            g = gradient_of(net, w, x[t][part], y[t][part])
            square = norm_of(g) ** 2
            g_hats.append(gradient_of(net, {n: w[n] + SIGMA * g[n] / square for n in w}, x[t][part], y[t][part]))
            radii_t.append(SIGMA / norm_of(g))
        base(w, {n: sum(g[n] for g in g_hats) / perturbations for n in w})
        radii.append(radii_t)
    ranks = run(own_perturbations, world_size, seed, scope)
    for rank, result in enumerate(ranks):
        mine = rank * perturbations // world_size
        np.testing.assert_allclose(result["radii"], [r[mine] for r in radii], rtol=1e-9)
        for n, value in w.items():
            np.testing.assert_allclose(result["weights"][n], value, rtol=0, atol=1e-11 * largest(w))
            assert np.array_equal(result["weights"][n], ranks[0]["weights"][n]), "replicas drifted apart"
        if scope == "local":
            assert result["reductions"] == STEPS + 1, "one gradient reduction a step"
        assert result["skip"] == (True, 1.0), "one rank's overflow must skip the update on all"


DRIFT_STEPS = 20
PLACES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "ddp": (2, "local", {}),
    "hsdp": (4, "replica", {"shard_size": 2}),
}
EVERYWHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (case.method, case.kwargs) for name, case in CASES.items()},
    "plus": (LESAM, {"alpha": 0.5}),
    "esam, samples": (optim.ESAM, {"rho": 0.1, "beta": 0.5, "gamma": 0.4}),
}
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plus, released": (LESAM, {"alpha": 0.5, "plus_form": "released"}),
    "gsam, alpha 0": (optim.GSAM, {"alpha": 0.0}),
    "wsam, gamma 1/2": (optim.WSAM, {"gamma": 0.5, "decouple": False}),
    "clip": (LESAM, {"max_grad_norm": 0.1}),
    "unchecked": (optim.SAM, {"check_second": False}),
    "fraction": (optim.ASAM, {"ascent_fraction": 0.5}),
    "interval": (LESAM, {"ascent_interval": 3}),
}
OWN = {"local": EVERYWHERE | OPTIONS, "replica": EVERYWHERE}  # what options do is alike; HSDP's steps are dear
USES_G = {"plus", "plus, released", "gsam", "ssam", "wsam", "wsam-coupled", "looksam"}
KEEPS_G = {"own", "friendly", "eigen"}
ONE_PASS = {"msam", "s2sam"}


def after_many_steps(
    world: Distributed, seed: int, strategy: Any, scope: Any, options: dict[str, Any]
) -> dict[tuple[str, str], Weights | str]:
    """The weights of every method in both scopes, or why it is refused."""
    state, x, y = make_problem(seed)
    part, results = part_of(world), {}
    cases = [*itertools.product(EVERYWHERE.items(), ["global"]), *itertools.product(OWN[scope].items(), [scope])]
    for (name, (method, kwargs)), chosen in cases:
        net = make_net()
        net.load_state_dict(state)
        own = {"scope": scope} if chosen == "replica" else {}
        model = wrap(net, world, strategy, **options, **own)
        try:
            optimizer = method(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, scope=chosen, **kwargs)
        except ValueError as error:
            results[name, chosen] = str(error)
            continue
        for t in range(DRIFT_STEPS):
            passes = BatchPasses(model, nn.CrossEntropyLoss(), x[t % STEPS][part], y[t % STEPS][part])
            optimizer.step([passes] if t == 1 else passes)
        results[name, chosen] = whole(net)
    return results


@pytest.mark.parametrize("strategy", PLACES)
def test_replicas_stay_equal_bit_for_bit_or_the_scope_is_refused(seed: int, strategy: str) -> None:
    world_size, scope, options = PLACES[strategy]
    ranks = run(after_many_steps, world_size, seed, strategy, scope, options)
    for (name, chosen), first in ranks[0].items():
        reasons = {"weights drift apart": USES_G, "a checkpoint saves one": KEEPS_G}
        reasons["no first pass"] = ONE_PASS
        reason = next((text for text, names in reasons.items() if name in names and chosen != "global"), None)
        for rank in ranks:
            if reason is not None:
                assert reason in rank[name, chosen], f"{name} {chosen}"
                continue
            assert not isinstance(first, str), f"{name} {chosen}: {first}"
            for n, value in first.items():
                assert np.array_equal(rank[name, chosen][n], value), f"{name} {chosen}: replicas drifted apart"


def impossible(world: Distributed) -> list[str]:
    """What is said of scopes that the wrapping does not allow."""
    x = torch.randn(2, 6)
    messages = []

    def attempt(error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            call()
        messages.append(str(caught.value))

    def stepping(model: nn.Module, scope: Any) -> None:
        optimizer = LESAM(model.parameters(), torch.optim.SGD, scope=scope, lr=0.1)

        def closure(sync: Sync = True) -> Tensor:
            loss = model(x).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    attempt(RuntimeError, lambda: stepping(wrap(make_net(), world, "fsdp"), "local"))
    attempt(RuntimeError, lambda: stepping(wrap(make_net(), world, "ddp"), "replica"))
    hsdp = {"shard_size": 1, "wrap_classes": ["Linear"]}
    attempt(RuntimeError, lambda: stepping(wrap(make_net(), world, "hsdp", **hsdp), "replica"))  # type: ignore[arg-type]
    attempt(UserError, lambda: wrap(make_net(), world, "fsdp", scope="replica"))
    passes = BatchPasses(wrap(make_net(), world, "ddp"), nn.CrossEntropyLoss(), x, torch.zeros(2, dtype=torch.long))
    attempt(RuntimeError, lambda: passes(sync="replica"))
    static = nn.parallel.DistributedDataParallel(make_net(), static_graph=True)
    passes = BatchPasses(static, nn.CrossEntropyLoss(), x, torch.zeros(2, dtype=torch.long))
    attempt(RuntimeError, lambda: passes(sync=False))
    return messages


def test_scopes_that_the_wrapping_does_not_allow() -> None:
    expected = (
        "scope='local' needs each process to hold all weights",
        "scope='replica' needs replicas of shards, but no parameter is sharded",
        "the parameters' mesh holds the replicas too",
        "only hsdp has replicas",
        "sync='replica' needs a model that",
        "static_graph=True",
    )
    for messages in run(impossible, 2):
        for message, part in zip(messages, expected, strict=True):
            assert part in message
