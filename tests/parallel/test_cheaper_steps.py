"""Micro-batches, parts of a batch and reused gradients under DDP, FSDP2 and HSDP; against float64 Algorithm 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD

from lesam_dist import LESAM, S2SAM, FriendlySAM, LookSAM
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.train.passes import BatchPasses
from tests.oracles import SGD64, Weights, algorithm_1, largest, m_sharpness, norm_of
from tests.parallel.processes import run
from tests.parallel.test_optimizers import BATCH, SIGMA, STEPS, gradient_of, make_net, make_problem
from tests.parallel.test_scopes import part_of, whole

KWARGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
CLIP = 0.1  # below the gradient's norm, or clipping would not show
WRAPPED: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "ddp2": (2, "ddp", {}),
    "fsdp3": (3, "fsdp", {"wrap_classes": ["Linear"]}),
    "hsdp2x2": (4, "hsdp", {"shard_size": 2, "wrap_classes": ["Linear"]}),
}


def make(world: Distributed, seed: int, how: str, **options: Any) -> tuple[nn.Module, nn.Module, LESAM]:
    net = make_net().double()
    net.load_state_dict(make_problem(seed)[0])
    model = wrap(net, world, WRAPPED[how][1], **WRAPPED[how][2])
    return net, model, LESAM(net.parameters(), SGD, sigma=SIGMA, rho_max=None, **options, **KWARGS)


def passes_of(world: Distributed, model: nn.Module, seed: int, t: int, rows: slice = slice(None)) -> BatchPasses:
    """``rows`` of this rank's part of batch t."""
    _, x, y = make_problem(seed)
    part = part_of(world)
    return BatchPasses(model, nn.CrossEntropyLoss(), x[t][part][rows].double(), y[t][part][rows])


def rows_of(world_size: int, rows: slice) -> list[int]:
    """Which samples of a batch the processes take together, if each takes ``rows`` of its part."""
    return [i for part in np.split(np.arange(BATCH), world_size) for i in part[rows]]


def train(world: Distributed, seed: int, how: str) -> dict[str, Weights]:
    results = {}
    net, model, optimizer = make(world, seed, how)
    for t in range(STEPS):
        optimizer.step([passes_of(world, model, seed, t, slice(i, None, 3)) for i in range(3)])
    results["micro"] = whole(net)
    for between in ("skip", "reuse"):
        options = {"ascent_interval": 3, "ascent_between": between, "ascent_fraction": 0.6}
        net, model, optimizer = make(world, seed, how, **options)
        for t in range(STEPS):
            optimizer.step(passes_of(world, model, seed, t))
        results[between] = whole(net)
    net, model, optimizer = make(world, seed, how, max_grad_norm=CLIP)
    for t in range(STEPS):
        optimizer.step(passes_of(world, model, seed, t))
    results["clip"] = whole(net)
    return results


@pytest.mark.parametrize("how", WRAPPED)
def test_the_same_numbers_everywhere(seed: int, how: str) -> None:
    world_size = WRAPPED[how][0]
    state, x, y = make_problem(seed)
    net = make_net().double()
    start = {n: value.double().numpy() for n, value in state.items()}

    def gradient(w: Weights, t: int, rows: list[int]) -> Weights:
        return gradient_of(net, w, x[t][rows], y[t][rows])

    parts = [rows_of(world_size, slice(i, None, 3)) for i in range(3)]
    micro = m_sharpness(
        start, lambda w, t, i: gradient(w, t, parts[i]), SGD64(**KWARGS), steps=STEPS, parts=3, sigma=SIGMA
    )
    first = rows_of(world_size, slice(0, int(np.ceil(0.6 * BATCH / world_size))))
    assert len(first) < BATCH
    whole_batch = list(range(BATCH))
    clipped, _ = algorithm_1(
        start,
        lambda w, t: gradient(w, t, whole_batch),
        SGD64(**KWARGS),
        steps=STEPS,
        sigma=lambda t: SIGMA,
        max_norm=CLIP,
    )
    assert norm_of(gradient(start, 0, whole_batch)) > CLIP
    expected = {"micro": micro, "clip": clipped}
    for between in ("skip", "reuse"):
        expected[between], _ = algorithm_1(
            start,
            lambda w, t: gradient(w, t, whole_batch),
            SGD64(**KWARGS),
            steps=STEPS,
            sigma=lambda t: SIGMA,
            first_gradient=lambda w, t: gradient(w, t, first),
            interval=3,
            reuse=between == "reuse",
        )
    for results in run(train, world_size, seed, how):
        for name, weights in expected.items():
            for n, value in weights.items():
                atol = 1e-11 * largest(weights)
                np.testing.assert_allclose(results[name][n], value, rtol=0, atol=atol, err_msg=f"{name} {n}")


METHODS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "lesam": (LESAM, {"ascent_interval": STEPS, "ascent_between": "reuse"}, "ascent_grad"),  # of step 0 to the end
    "fsam": (FriendlySAM, {}, "friendly_ema"),
    "looksam": (LookSAM, {}, "look_back"),
    "s2sam": (S2SAM, {}, "previous_grad"),
}


def remembering(
    world: Distributed, seed: int, how: str, folder: Path, first: int, last: int
) -> dict[str, tuple[Weights, bool]]:
    """Steps ``first`` to ``last``, from the checkpoints in the folder unless from the start; leaves some there.

    Returns of each method the weights, and whether its tensors are in the checkpoint.
    """
    results = {}
    for name, (method, options, kept) in METHODS.items():
        net, model, _ = make(world, seed, how)
        optimizer = method(net.parameters(), SGD, **options, **KWARGS)
        if first > 0:
            weights, state = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        for t in range(first, last):
            optimizer.step(passes_of(world, model, seed, t))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / name)
        results[name] = whole(net), all(kept in own for own in state["state"].values())
    return results


def test_what_a_method_keeps_is_resharded(seed: int, tmp_path: Path) -> None:
    """Two steps on 3 shards, the others on 2 x 2: as all on 3."""
    run(remembering, 3, seed, "fsdp3", tmp_path / "moved", 0, 2)
    moved = run(remembering, 4, seed, "hsdp2x2", tmp_path / "moved", 2, STEPS)[0]
    stayed = run(remembering, 3, seed, "fsdp3", tmp_path / "stayed", 0, STEPS)[0]
    for name, (expected, has_stayed) in stayed.items():
        actual, has_moved = moved[name]
        assert has_moved
        assert has_stayed
        for n, value in expected.items():
            atol = 1e-11 * largest(expected)
            np.testing.assert_allclose(actual[n], value, rtol=0, atol=atol, err_msg=f"{name} {n}")


def moving_shards(world: Distributed, seed: int) -> tuple[Tensor, Tensor]:
    """A step perturbed by a kept gradient, whose pass puts the shard elsewhere; the weights after it, and by hand."""
    torch.manual_seed(seed)
    w, kept = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (world.world_size,))
    p = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
    optimizer = S2SAM([p], SGD, rho=0.1, lr=0.1)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"previous_grad": distribute_tensor(kept, mesh, [Shard(0)])}}
    optimizer.load_state_dict(saved)

    def closure() -> Tensor:
        p._local_tensor = p._local_tensor.clone()  # type: ignore[attr-defined]
        loss = (p.full_tensor() ** 2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return p.full_tensor().detach(), w - 0.1 * (w + 0.1 * kept / kept.norm())


def test_shards_that_move_in_the_first_forward(seed: int) -> None:
    for actual, expected in run(moving_shards, 2, seed):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
