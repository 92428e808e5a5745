"""`parallel.reduce_dtype`: DDP reduces the gradient of the update in bfloat16, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

from lesam_dist import LESAM
from lesam_dist.config.schema import Config
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.train.passes import gradient_sync
from lesam_dist.train.updates import Updates
from tests.parallel.processes import run
from tests.told import told

U = 2.0**-8  # bfloat16's unit roundoff


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes of all reductions of gradients, by dtype."""
    found: dict[str, int] = {}
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):  # as the hooks of DDP call it
            name = str(tensor.dtype).removeprefix("torch.")
            found[name] = found.get(name, 0) + tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counting):
        yield found


def problem(world: Distributed, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    x, y = torch.randn(world.world_size, 4, 6), torch.randint(0, 3, (world.world_size, 4))
    return net, x[world.rank], y[world.rank]


def one_pass(world: Distributed, seed: int, rounded: bool | None) -> tuple[dict[str, int], list[Any]]:
    """What a backward reduces, and its gradients; ``rounded`` None reduces nothing."""
    net, x, y = problem(world, seed)
    model = wrap(net, world, "ddp", reduce_dtype=torch.bfloat16)
    with counted() as found, gradient_sync(model, rounded is not None, bool(rounded)):
        nn.functional.cross_entropy(model(x), y).backward()
    return found, [p.grad.numpy() for p in net.parameters() if p.grad is not None]


def updates(world: Distributed, seed: int, method: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Two updates as the trainer makes them: what each pass of the second reduces, and the weights."""
    net, x, y = problem(world, seed)
    model = wrap(net, world, "ddp", reduce_dtype=torch.bfloat16)
    config = Config()
    config.data.micro_batches = fields.get("micro_batches", 1)
    if method == "sgd":
        optimizer: Any = Plain(net.parameters(), SGD, lr=0.1)
    else:
        optimizer = LESAM(net.parameters(), SGD, lr=0.1, scope=fields.get("scope", "global"))
    made = Updates(Classification(config, world), *told(world), model, optimizer, None, None, 1)
    passes: list[dict[str, int]] = []
    with counted() as found:
        made.make(0, (x, y), logged=False)

        def moved(self: Distributed, what: str, *rest: Any) -> None:
            if not what.startswith("pass"):
                return  # it goes on within this pass, or after it
            if passes:
                passes[-1] = dict(found)
            found.clear()
            passes.append({})

        with mock.patch.object(Distributed, "move", moved):
            made.make(0, (x, y), logged=False)
        passes[-1] = dict(found)
    weights = [p.detach().numpy().copy() for p in net.parameters()]
    if world.rank == 0:
        x = x.clone()
        x[0, 0] = float("inf")
    made.make(0, (x, y), logged=False)
    after = [p.detach().numpy() for p in net.parameters()]
    return {"passes": passes, "weights": weights, "skipped": optimizer.telemetry["skipped"].item(), "after": after}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lesam": ("lesam", {}),
    "local": ("lesam", {"scope": "local"}),
    "parts": ("lesam", {"micro_batches": 2}),
    "sgd": ("sgd", {}),
}


def all_of_it(world: Distributed, seed: int) -> dict[str, Any]:
    return {
        "passes": [one_pass(world, seed, rounded) for rounded in (None, False, True)],
        "updates": {name: updates(world, seed, *how) for name, how in METHODS.items()},
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_the_gradient_of_the_update_is_rounded_and_no_other(seed: int, processes: int) -> None:
    ranks = run(all_of_it, processes, seed)
    elements = sum(p.numel() for p in problem(Distributed(0, 0, processes, torch.device("cpu")), seed)[0].parameters())
    half, whole = {"bfloat16": 2 * elements}, {"float32": 4 * elements}
    by_pass = {"lesam": [whole, half], "local": [{}, half], "parts": [whole, half], "sgd": [half]}
    for rank in ranks:
        assert [found for found, _ in rank["passes"]] == [{}, whole, half]
        for (_, own), (_, first) in zip(rank["passes"][1:], ranks[0]["passes"][1:], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(own, first, strict=True))
        for name, result in rank["updates"].items():
            assert result["passes"] == by_pass[name], name
            assert result["skipped"] == 1, "a gradient that is not finite stays so, everywhere"
            for kind in ("weights", "after"):
                for a, b in zip(result[kind], ranks[0]["updates"][name]["weights"], strict=True):
                    assert np.array_equal(a, b)
    check_roundings(
        [[g.astype(np.float64) / processes for g in rank["passes"][0][1]] for rank in ranks],
        *(grads for _, grads in ranks[0]["passes"][1:]),
    )


def check_roundings(shares: list[list[Any]], exact: list[Any], rounded: list[Any]) -> None:
    """Each process's share is rounded once, then each of the n - 1 sums; beside that come float32's roundings."""
    n = len(shares)
    for index, (g, g_rounded) in enumerate(zip(exact, rounded, strict=True)):
        parts = np.stack([share[index] for share in shares])
        total, size = parts.sum(0), np.abs(parts).sum(0)
        of_float32 = ((1 + 2.0**-24) ** (n + 1) - 1) * size
        assert (np.abs(g - total) <= of_float32).all()
        bound = ((1 + U) ** n - 1) * size + of_float32
        assert (np.abs(g_rounded - total) <= bound).all()
        assert np.abs(g_rounded - total).max() > of_float32.max(), "nothing was rounded"
