"""Two processes that take the steps of one: what the libraries' loops are started with, and what must come of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lesam_dist.parallel.processes import Distributed

Result = tuple[Mapping[str, Tensor], list[float]]
"""The whole weights at the end, and each step's radius."""


def start(world: Distributed, port: int) -> None:
    """Set what a launcher does, of two processes on one host."""
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def assert_steps_of_one(
    kinds: Iterable[str],
    results: Sequence[Mapping[str, Result]],
    expected: Mapping[str, Tensor],
    tolerance: Mapping[str, float],
) -> None:
    """Of each kind both ranks' ``results`` are the same bits, and, but for "local", the ``expected`` weights."""
    for kind in kinds:
        (first, rho), (second, other_rho) = (rank[kind] for rank in results)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        if kind == "local":
            assert rho != other_rho, "each process perturbs by its own gradient"
        else:
            torch.testing.assert_close(first, expected, **tolerance)
            assert rho == other_rho, kind
