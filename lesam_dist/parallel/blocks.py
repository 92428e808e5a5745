"""The blocks that a model repeats: the units in which it is compiled, recomputed and gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lesam_dist.errors import UserError, unknown_name

# torchvision's residual and transformer blocks, which some models of this package use too, and those of the others.
_BLOCKS = (
    *("BasicBlock", "Bottleneck", "EncoderBlock", "SwinTransformerBlock", "SwinTransformerBlockV2", "CNBlock"),
    *("WideBlock", "PyramidBlock"),
    # timm's most used ones; none of them lies within another
    *("Block", "EvaBlock", "ConvNeXtBlock", "HieraBlock", "LayerScaleBlock", "MaxxVitBlock", "MetaFormerBlock"),
    *("MixerBlock", "PreActBottleneck", "SpatialGatingBlock", "SwinTransformerV2Block", "XCABlock"),
)

# Identical blocks share graphs, but all blocks of a class share one cache: a ResNet-50 has 8 shapes of block, and each
# needs a graph per pass and per batch size of evaluation.
_GRAPHS_PER_CODE = 256


def find_blocks(model: nn.Module, wrap_classes: Sequence[str] = ()) -> list[nn.Module]:
    """The modules of the classes in ``wrap_classes``, or all known blocks where that is empty.

    Raises:
        UserError: for a class that the model does not have.
    """
    present = {type(module).__name__ for module in model.modules()}
    for name in wrap_classes:
        if name not in present:
            raise unknown_name("class in parallel.wrap_classes", name, present)
    names = set(wrap_classes or _BLOCKS)
    return [module for module in model.modules() if type(module).__name__ in names]


def recompute_in_backward(model: nn.Module, wrap_classes: Sequence[str] = ()) -> None:
    """Keep only the input of each block for backward, which runs the block again with the same random numbers.

    In place; names and `state_dict` stay. Call it before `compile_in_place` and `lesam_dist.parallel.wrap`.

    Raises:
        UserError: where there are no blocks, or one has BatchNorm: its statistics would move twice in a pass.
    """
    blocks = find_blocks(model, wrap_classes)
    if not blocks:
        raise UserError(
            f"model.activation_checkpointing is true but {type(model).__name__} has none of the known blocks "
            f"({', '.join(_BLOCKS)}): name its own with parallel.wrap_classes, or set it to false."
        )
    for block in blocks:
        if any(isinstance(module, _BatchNorm) for module in block.modules()):
            raise UserError(
                f"model.activation_checkpointing is true but {type(block).__name__} has BatchNorm, whose running "
                "statistics would move a second time when it is recomputed: set it to false (data.micro_batches saves "
                "memory too), or name blocks without BatchNorm with parallel.wrap_classes."
            )
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A function of this file, since `torch.compile` would leave a block alone whose forward is `checkpoint` itself."""
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_in_place(
    model: nn.Module, whole: bool, wrap_classes: Sequence[str] = (), backend: str | Callable[..., Any] = "inductor"
) -> None:
    """`torch.compile` the model; names and `state_dict` stay. Graphs are made in the first forwards.

    Args:
        model: on its device, not wrapped.
        whole: one graph for the whole model; under DDP torch cuts it where its buckets end, and reduces during the
            backward. False makes one for each block, between which FSDP2 gathers; a model without blocks is compiled
            whole.
        wrap_classes: see `find_blocks`.
        backend: of `torch.compile`.
    """
    from torch._dynamo import config as dynamo  # here: importing it takes a second

    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS_PER_CODE)
    for module in [model] if whole else find_blocks(model, wrap_classes) or [model]:
        # Fixed shapes: else blocks of different sizes make each other's graphs dynamic, which are slower.
        module.compile(backend=backend, dynamic=False)
