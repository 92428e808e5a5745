"""A solver on one process, and all the others' images in each of its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lesam_dist.analysis.engine.lanczos import Product
from lesam_dist.analysis.engine.objective import Objective

Result = TypeVar("Result")


def solve(objective: Objective, solver: Callable[[Product], Result]) -> Result:
    """``solver(product)`` on rank 0, where ``product(v)`` is `Objective.hessian_product`; its result on every rank.

    What a solver decides, such as when it has converged, is thus decided once. The other ranks take part in each
    product: a broadcast of v, and the all-reduce of the product.

    Args:
        objective: the loss.
        solver: called on rank 0; its result must be one that can be pickled.
    """
    world = objective.world
    if world.world_size == 1:
        return solver(objective.hessian_product)
    message = torch.zeros(objective.size + 1, dtype=objective.dtype, device=objective.device)
    vector, goes_on = message[:-1], message[-1]
    result: Result | None = None
    if world.is_main:

        def product(v: Tensor) -> Tensor:
            vector.copy_(v)
            goes_on.fill_(1)
            dist.broadcast(message, src=0)
            return objective.hessian_product(v)

        result = solver(product)
        goes_on.fill_(0)
        dist.broadcast(message, src=0)
    else:
        dist.broadcast(message, src=0)
        while goes_on:
            objective.hessian_product(vector)
            dist.broadcast(message, src=0)
    shared: Result = world.share(result)
    return shared
