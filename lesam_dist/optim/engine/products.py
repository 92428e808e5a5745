"""Products with the Hessian by differentiating twice (Pearlmutter, 1994), and what a closure owes to be asked for them.

A function of torch's that computes its own gradient may have no second one: attention outside torch's own ("math")
kernel, `SyncBatchNorm`, sharded weights. A closure knows its model, so it says whether it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

COST = 3
"""Of a product, in forward and backward passes: what it multiplies, in a forward that costs 1 and backward passes that
cost 2 each, is 1 + 2, and twice that to differentiate it."""


class NotTwiceDifferentiableError(RuntimeError):
    """A model's gradient cannot be differentiated, as it is wrapped or for what it is made of."""


@runtime_checkable
class TwiceDifferentiable(Protocol):
    """A closure that also makes products with the Hessian, as `lesam_dist.BatchPasses` does."""

    def hessian_product(self, along: Mapping[Tensor, Tensor]) -> None:
        """Add ``H v`` to ``.grad``, averaged over the processes, of the same loss as when it is called.

        Args:
            along: v: of each parameter that it varies a tensor of its shape. H is the block of these parameters.

        Raises:
            NotTwiceDifferentiableError: before anything is computed, on all processes alike.
        """


def hessian_backward(loss: Tensor, along: Mapping[Tensor, Tensor]) -> None:
    """Add ``H v`` to ``.grad`` of each parameter, as ``loss.backward()`` adds the gradient; for a closure of your own.

    Args:
        loss: 0-d, with its graph.
        along: see `TwiceDifferentiable`. A parameter that the loss does not depend on gets zeros.
    """
    params = list(along)
    gradient = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    pairs = zip(gradient, along.values(), strict=True)
    varying = [(g, v.to(g.dtype)) for g, v in pairs if g is not None and g.requires_grad]  # else linear in it
    if varying:
        outputs, vectors = zip(*varying, strict=True)
        products = torch.autograd.grad(outputs, params, vectors, materialize_grads=True)
    else:
        products = tuple(torch.zeros_like(p) for p in params)
    for p, product in zip(params, products, strict=True):
        p.grad = product if p.grad is None else p.grad.add_(product)
