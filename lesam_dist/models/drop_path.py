"""Stochastic depth: Huang et al., "Deep Networks with Stochastic Depth" (2016).

In training each sample leaves the residual branch of block l of L out with probability p_l = rate * (l - 1) / (L - 1),
their linear rule as later networks have it, from none in the first block to the whole rate in the last. What stays is
divided by 1 - p_l, so that the mean is the branch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

# The modules whose output is added to the shortcut, in torchvision's blocks and this package's.
_BRANCH_ENDS = {
    "BasicBlock": ("bn2",),
    "Bottleneck": ("bn3",),
    "EncoderBlock": ("dropout", "mlp"),
    "WideBlock": ("conv2",),
    "PyramidBlock": ("bn3",),
}


def set_drop_path(model: nn.Module, rate: float) -> bool:
    """Give a model this rate of stochastic depth, in place; names and `state_dict` stay.

    A model that has stochastic depth already keeps how its rates grow from block to block.

    Returns:
        Whether it has residual blocks for it.
    """
    own = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    largest = max((module.p for module in own), default=0.0)
    for module in own:
        module.p *= rate / largest if largest else 0.0
    if own:
        return largest > 0
    blocks = [module for module in model.modules() if type(module).__name__ in _BRANCH_ENDS]
    for index, block in enumerate(blocks):
        p = rate * index / max(1, len(blocks) - 1)
        for end in _BRANCH_ENDS[type(block).__name__]:
            # A hook, since a module of its own would rename what is in checkpoints.
            block.get_submodule(end).register_forward_hook(partial(_drop, p=p))
    return bool(blocks)


def _drop(module: nn.Module, _: Any, output: Tensor, *, p: float) -> Tensor:
    dropped: Tensor = stochastic_depth(output, p, "row", module.training)
    return dropped
