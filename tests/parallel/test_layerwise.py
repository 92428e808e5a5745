"""LARS and LAMB over shards: the numbers of one process, one reduction a step, and a state that is resharded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lesam_dist import LESAM
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.optim import LAMB, LARS
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.passes import BatchPasses
from tests.layerwise import LAMB64, LARS64
from tests.parallel.processes import run
from tests.parallel.test_optimizers import BATCH, RHO_MAX, SIGMA, STEPS, make_net

# With its usual eps LAMB's first steps are signs, which a rounding of a gradient near zero turns round.
SOFT: dict[str, Any] = {"eps": 1e-2}
BASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lars": (LARS, LARS64, {"lr": 1.0, "weight_decay": 0.05, "trust_coefficient": 0.05}),
    "lamb": (partial(LAMB, **SOFT), partial(LAMB64, **SOFT), {"lr": 0.05, "weight_decay": 0.05}),
}
# By the number of processes. Layers of 1 and 3 rows leave shards empty or uneven.
WRAPPINGS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [("fsdp", {"wrap_classes": ["Linear"]})],
    3: [("ddp", {}), ("fsdp", {})],
    4: [("hsdp", {"shard_size": 2})],
}
SAVED = 2  # steps
OF_PATH = 1e-12  # as `tests.parallel.test_optimizers` has it in float64
Weights = dict[str, NDArray[np.float64]]


def problem(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    return make_net().double(), torch.randn(STEPS, BATCH, 6).double(), torch.randint(0, 3, (STEPS, BATCH))


def build(net: nn.Module, base: str) -> LESAM:
    cls, _, kwargs = BASES[base]
    return LESAM(net.parameters(), cls, sigma=SIGMA, rho_max=RHO_MAX, **kwargs)


def train(
    world: Distributed, seed: int, wrapping: tuple[str, Any], base: str, steps: range, folder: Path | None = None
) -> tuple[nn.Module, LESAM]:
    """Net and optimizer after these steps, the first of which come from a checkpoint, if there is one."""
    net, x, y = problem(seed)
    model = wrap(net, world, wrapping[0], **wrapping[1])  # type: ignore[arg-type]
    optimizer = build(net, base)
    if folder is not None:
        assert checkpointer(world, folder, base).load_latest(net, optimizer).progress is not None
    part = slice(world.rank * BATCH // world.world_size, (world.rank + 1) * BATCH // world.world_size)
    for t in steps:
        optimizer.step(BatchPasses(model, nn.CrossEntropyLoss(), x[t][part], y[t][part]))
    return net, optimizer


def checkpointer(world: Distributed, folder: Path, base: str) -> Checkpointer:
    (folder / base).mkdir(exist_ok=True)
    return Checkpointer(folder / base, world, CheckpointConfig(asynchronous="never"))


def whole(net: nn.Module) -> Weights:
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in net.named_parameters()}
    return {n: p.detach().numpy().copy() for n, p in full.items()}


def reductions(net: nn.Module, optimizer: LESAM) -> dict[str, int]:
    """Collectives of a step of the base alone, by name."""
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with CommDebugMode() as mode:
        optimizer.base_optimizer.step()
    return {str(op).rsplit(".")[-1]: n for op, n in mode.get_comm_counts().items() if n}


def on_all(world: Distributed, seed: int, folder: Path) -> list[dict[str, Any]]:
    results = []
    for wrapping in WRAPPINGS[world.world_size]:
        for base in BASES:
            if (world.world_size, wrapping[0]) == (3, "fsdp"):
                net, optimizer = train(world, seed, wrapping, base, range(SAVED))
                assert checkpointer(world, folder, base).save(SAVED, net, optimizer, {"epoch": 0})
            net, optimizer = train(world, seed, wrapping, base, range(STEPS))
            result = {"name": wrapping[0], "base": base, "weights": whole(net)}
            results.append(result | {"reductions": reductions(net, optimizer)})
    return results


def go_on(world: Distributed, seed: int, folder: Path) -> dict[str, Weights]:
    fsdp = WRAPPINGS[2][0]
    return {base: whole(train(world, seed, fsdp, base, range(SAVED, STEPS), folder)[0]) for base in BASES}


def expected(seed: int, base: str) -> Weights:
    """Algorithm 1 of the whole batch, with the oracle's update."""
    _, oracle, kwargs = BASES[base]
    net, x, y = problem(seed)
    names = [n for n, _ in net.named_parameters()]
    weights = [p.detach().numpy().copy() for p in net.parameters()]
    other = oracle(**kwargs)

    def gradients(at: list[Any], t: int) -> list[Any]:
        with torch.no_grad():
            for p, w in zip(net.parameters(), at, strict=True):
                p.copy_(torch.from_numpy(w))
        net.zero_grad()
        nn.functional.cross_entropy(net(x[t]), y[t]).backward()
        return [p.grad.numpy().copy() for p in net.parameters() if p.grad is not None]

    for t in range(STEPS):
        g = gradients(weights, t)
        norm = np.sqrt(sum((part**2).sum() for part in g))
        rho = min(SIGMA / norm, RHO_MAX)
        other.step(weights, gradients([w + rho * part / norm for w, part in zip(weights, g, strict=True)], t))
    return dict(zip(names, weights, strict=True))


def assert_close(actual: Weights, wanted: Weights, start: Weights) -> None:
    path = max(np.abs(wanted[n] - start[n]).max() for n in wanted)
    assert path > 1e-2
    for n, w in wanted.items():
        np.testing.assert_allclose(actual[n], w, rtol=0, atol=OF_PATH * path, err_msg=n)


@pytest.mark.parametrize("processes", WRAPPINGS)
def test_the_numbers_of_one_process(seed: int, processes: int, tmp_path: Path) -> None:
    """And a state that three processes saved, one of them with empty shards, goes on in two and in one."""
    start = whole(problem(seed)[0])
    wanted = {base: expected(seed, base) for base in BASES}
    ranks = run(on_all, processes, seed, tmp_path)
    for results in ranks:
        for result, first in zip(results, ranks[0], strict=True):
            assert_close(result["weights"], wanted[result["base"]], start)
            for n, w in result["weights"].items():
                assert np.array_equal(w, first["weights"][n]), "the processes' weights differ"
            assert result["reductions"] == ({} if result["name"] == "ddp" else {"allreduce_": 1})
    if processes == 3:
        for weights in (*run(go_on, 2, seed, tmp_path), *run(go_on, 1, seed, tmp_path)):
            for base in BASES:
                assert_close(weights[base], wanted[base], start)
