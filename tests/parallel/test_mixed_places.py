"""One optimizer over parameters that are split in different ways: one norm over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lesam_dist import LESAM
from lesam_dist.parallel.processes import Distributed
from tests.parallel.processes import run

SHAPES = {"over 4": (5, 3), "over 2 of 2x2": (3, 2), "replicated": (4,), "plain": (2, 3)}


def step_by_hand(world: Distributed, backend: Any) -> dict[str, Any]:
    """One LE-SAM step with given gradients."""
    torch.manual_seed(0)  # the same on every rank: a plain tensor is each rank's own
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    grads = [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(2)]
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    places: dict[str, Any] = {
        "over 4": (line, [Shard(0)]),
        "over 2 of 2x2": (square, [Replicate(), Shard(0)]),
        "replicated": (square, [Replicate(), Replicate()]),
    }

    def put(name: str, tensor: torch.Tensor) -> torch.Tensor:
        own = tensor.clone()  # a replicated DTensor shares its memory
        return distribute_tensor(own, *places[name]) if name in places else own

    params = {name: nn.Parameter(put(name, w)) for name, w in weights.items()}
    kwargs: dict[str, Any] = {"sigma": 0.3, "rho_max": None, "lr": 0.1}
    optimizer = LESAM(params.values(), torch.optim.SGD, backend=backend, **kwargs)

    def whole() -> dict[str, Any]:
        full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in params.items()}
        return {n: p.detach().double().numpy().copy() for n, p in full.items()}

    seen = []
    for step, gradient in zip((optimizer.first_step, optimizer.second_step), grads, strict=True):
        for name, p in params.items():
            p.grad = put(name, gradient[name])
        step()
        seen.append(whole())
    as_arrays = [{n: t.double().numpy() for n, t in ts.items()} for ts in (weights, *grads)]
    return {"seen": seen, "given": as_arrays, "norm": optimizer.telemetry["grad_norm"].item()}


def test_one_norm_over_different_meshes_and_plain_tensors() -> None:
    for backend in ("reference", "triton"):
        for result in run(step_by_hand, 4, backend):
            w, g, g_hat = result["given"]
            norm = np.sqrt(sum(float((value**2).sum()) for value in g.values()))
            assert abs(result["norm"] / norm - 1) < 1e-6
            for name, value in w.items():
                perturbed, stepped = (seen[name] for seen in result["seen"])
                np.testing.assert_allclose(perturbed, value + 0.3 * g[name] / norm**2, rtol=0, atol=1e-6)
                np.testing.assert_allclose(stepped, value - 0.1 * g_hat[name], rtol=0, atol=1e-6)
