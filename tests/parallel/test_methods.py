"""Every method gives the same numbers in one process, under DDP, FSDP2 with empty shards and HSDP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lesam_dist import optim
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.methods import CASES, EIGEN
from tests.oracles import Weights, largest
from tests.parallel.processes import run
from tests.parallel.test_optimizers import BATCH, STEPS, make_net, make_problem
from tests.parallel.test_scopes import part_of, whole

WRAPPED: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "ddp2": (2, "ddp", {}),
    "fsdp3": (3, "fsdp", {"wrap_classes": ["Linear"]}),
    "hsdp2x2": (4, "hsdp", {"shard_size": 2, "wrap_classes": ["Linear"]}),
}
# The interpreter is slow, so it has one turn, the one with empty shards, and only with methods that differ in what
# the kernels do: a metric, memory, a mixture of both gradients, steps without a first pass.
FOR_KERNELS = ("lesam-adaptive", "friendly", "gsam", "looksam")
PLAIN, KERNELS = ("reference", torch.float64), ("triton", torch.float32)
# Of the largest weight. float32: LookSAM and EigenSAM scale differences of gradients up, see tests/optim/test_methods.
ATOL = {torch.float64: 1e-10, torch.float32: 2e-5}
AMPLIFIED = {"looksam": 10, "eigen": 10}
EXACT = "eigen, exact"  # products with the Hessian, which sharded weights do not have
ALL_CASES = {**CASES, EXACT: replace(CASES["eigen"], kwargs={**EIGEN, "products": "exact"})}


def train(
    world: Distributed, seed: int, strategy: Any, options: dict[str, Any], settings: list[tuple[str, str, torch.dtype]]
) -> dict[tuple[str, Any], Weights]:
    state, x, y = make_problem(seed)
    part = part_of(world)
    results = {}
    for name, backend, dtype in settings:
        case = ALL_CASES[name]
        net = make_net().to(dtype)
        net.load_state_dict(state)
        model = wrap(net, world, strategy, **options)
        optimizer: Any = case.method(  # type: ignore[call-arg]
            net.parameters(),  # type: ignore[arg-type]
            torch.optim.SGD,  # type: ignore[arg-type]
            backend=backend,
            lr=0.05,
            momentum=0.9,
            **case.kwargs,
        )
        if strategy in ("fsdp", "hsdp") and name == "eigen":
            with pytest.raises(ValueError, match="products is 'exact', but weights are sharded"):
                optim.EigenSAM(net.parameters(), torch.optim.SGD, products="exact", lr=0.1)
        for t in range(STEPS):
            optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x[t][part].to(dtype), y[t][part]))
        results[name, (backend, dtype)] = whole(net)
    return results


def select(world: Distributed, seed: int, strategy: Any, options: dict[str, Any]) -> Weights:
    """ESAM with every choice on; equal data on all ranks, so that all select the same samples."""
    state, x, y = make_problem(seed)
    net = make_net().double()
    net.load_state_dict(state)
    model = wrap(net, world, strategy, **options)
    kwargs: dict[str, Any] = {"rho": 0.1, "beta": 0.5, "gamma": 0.5, "lr": 0.05}
    optimizer = optim.ESAM(net.parameters(), torch.optim.SGD, **kwargs)
    for t in range(STEPS):
        optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x[t].double(), y[t], micro_batches=BATCH // 6))
    return whole(net)


def both(
    world: Distributed, seed: int, strategy: Any, options: dict[str, Any], settings: list[tuple[str, str, torch.dtype]]
) -> tuple[dict[tuple[str, Any], Weights], Weights]:
    return train(world, seed, strategy, options, settings), select(world, seed, strategy, options)


@pytest.mark.parametrize(
    ("how", "with_kernels"),
    [
        ("ddp2", ()),
        ("fsdp3", FOR_KERNELS),
        pytest.param("fsdp3", tuple(name for name in CASES if name not in FOR_KERNELS), marks=pytest.mark.full),
        ("hsdp2x2", ()),
    ],
    ids=["ddp2", "fsdp3", "fsdp3-other-kernels", "hsdp2x2"],
)
def test_the_same_numbers_everywhere(seed: int, how: str, with_kernels: tuple[str, ...]) -> None:
    world_size, strategy, options = WRAPPED[how]
    cases = ALL_CASES if strategy == "ddp" else CASES
    settings = [*((name, *PLAIN) for name in cases), *((name, *KERNELS) for name in with_kernels)]
    ((alone, selected_alone),) = run(both, 1, seed, "none", {}, settings)
    ranks, selected = zip(*run(both, world_size, seed, strategy, options, settings), strict=True)
    for (name, (backend, dtype)), weights in alone.items():
        reference = alone[name, PLAIN]
        atol = ATOL[dtype] * (AMPLIFIED.get(name, 1) if dtype == torch.float32 else 1) * largest(reference)
        for rank in ranks:
            for n, value in reference.items():
                actual = rank[name, (backend, dtype)][n]
                np.testing.assert_allclose(actual, value, rtol=0, atol=atol, err_msg=f"{name} {n}")
                assert np.array_equal(actual, ranks[0][name, (backend, dtype)][n]), f"{name}: replicas drifted apart"
                np.testing.assert_allclose(weights[n], value, rtol=0, atol=atol, err_msg=name)
    for selected_here in selected:
        for n, value in selected_alone.items():
            np.testing.assert_allclose(selected_here[n], value, rtol=0, atol=1e-11 * largest(selected_alone))
