"""What one LE-SAM step keeps in memory on one process, as arithmetic on parameter shapes.

Left out: activations and all else that grows with the batch (`lesam_dist.planning.profile` has them), buffers such as
BatchNorm's statistics, scalars, and the kernels' pointer tables (192 bytes per parameter tensor with SGD, 208 with
AdamW, and 12 per 16384 elements).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

Shape = tuple[int, ...]
Base = Literal["sgd", "adamw"]
Strategy = Literal["none", "ddp", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("none", "ddp", "fsdp")

_STATE_TENSORS: dict[Base, int] = {"sgd": 1, "adamw": 2}  # momentum; both moments
_STEP_BYTES: dict[Base, int] = {"sgd": 0, "adamw": 4}  # the float32 count of each tensor's steps


class Weight(NamedTuple):
    """A parameter: its whole shape, and whether its group takes part in the perturbation."""

    shape: Shape
    perturbed: bool = True


class Network(NamedTuple):
    """Weights in the order of the forward pass. FSDP2 gathers each unit by itself, and ``stem`` and ``head`` together:
    they are the root."""

    stem: Sequence[Weight]
    units: Sequence[Sequence[Weight]]
    head: Sequence[Weight]

    @property
    def weights(self) -> list[Weight]:
        """All of them."""
        return [*self.stem, *(weight for unit in self.units for weight in unit), *self.head]


def network_of(model: nn.Module, blocks: Sequence[nn.Module]) -> Network:
    """The weights of a model whose blocks are gathered as units; in the order in which they were registered."""
    members = [list(block.parameters()) for block in blocks]
    inside = {p for unit in members for p in unit}
    params = list(model.parameters())
    first = next((i for i, p in enumerate(params) if p in inside), len(params))
    stem, head = params[:first], [p for p in params[first:] if p not in inside]
    return Network(_weights(stem), [_weights(unit) for unit in members], _weights(head))


def _weights(params: Sequence[nn.Parameter]) -> list[Weight]:
    return [Weight(tuple(p.shape)) for p in params]


class Memory(NamedTuple):
    """Bytes on one process. All but ``transient`` exist together when the second backward is done."""

    parameters: int
    gradients: int
    copies: int
    state: int
    transient: int

    @property
    def peak(self) -> int:
        """Of the whole step."""
        return sum(self)


def predict(
    network: Network, strategy: Strategy, base: Base, ranks: int = 1, rank: int = 0, itemsize: int = 4
) -> Memory:
    """Bytes of a LE-SAM step from the second on, when the base optimizer's state exists.

    With P elements of b bytes, on every process under "none" and "ddp":

        parameters  P b
        gradients   P b        one set for both passes. DDP's gradients are views of its buckets, which always exist
        copies      P' b       P': the elements of perturbed groups
        state       P b        SGD's momentum; AdamW 2 P b, and 4 bytes per tensor
        transient   0          DDP: the largest parameter's b bytes, a gradient that is not in its bucket yet

    Under "fsdp" each tensor of n rows is split by rows, ceil(n / ranks) to a rank, as long as there are some.
    Parameters and gradients are padded to that on every rank; copies and state are not. Units are gathered for a
    while: see `_gathered`.

    Args:
        network: what is trained.
        strategy: how it is wrapped.
        base: SGD with momentum, or AdamW.
        ranks: processes; matters under "fsdp" alone.
        rank: of this process.
        itemsize: b.
    """
    shards, shard = (ranks, rank) if strategy == "fsdp" else (1, 0)
    weights = network.weights
    padded = itemsize * _padded(weights, shards)
    copies = itemsize * _own([weight for weight in weights if weight.perturbed], shards, shard)
    state = itemsize * _own(weights, shards, shard) * _STATE_TENSORS[base] + len(weights) * _STEP_BYTES[base]
    transient = 0
    if strategy == "ddp":
        transient = itemsize * max(math.prod(weight.shape) for weight in weights)
    elif shards > 1:
        transient = itemsize * _gathered(network, shards)
    return Memory(padded, padded, copies, state, transient)


def _gathered(network: Network, shards: int) -> int:
    """Elements that FSDP2 has for a while, beyond everybody's own shards, where the backward pass needs most.

    Whole and padded, a unit takes U elements; its gradient takes G. When the backward of unit i ends there are

        U[i] + G[i]          its weights and the gradient of all of it
        U[i - 1]             the all-gather for the next unit, which has begun
        U[i + 1]             the input of the last unit's reduce-scatter, kept until the next begins
        U[root] + G[head]    gathered, or computed, first and let go last

    and the gradients' shards of later units, but not yet of earlier ones. So about four units and the root, and the
    head once more. The forward pass needs less: three units and the root.
    """
    stem, units, head = network
    whole = [shards * _padded(unit, shards) for unit in units]
    shards_of_gradients = _padded(network.weights, shards)
    done = most = 0
    for i in reversed(range(len(units))):
        neighbours = sum(whole[max(i - 1, 0) : i]) + sum(whole[i + 1 : i + 2])
        most = max(most, whole[i] + _padded(units[i], 1) + neighbours + done)
        done += whole[i] // shards
    at_the_end = shards_of_gradients + _padded(stem, 1)  # when the root's gradient is reduced
    root = shards * _padded([*stem, *head], shards) + _padded(head, 1)
    return max(most, at_the_end) + root - shards_of_gradients


def _rows(weight: Weight, shards: int) -> int:
    return -(-weight.shape[0] // shards)


def _padded(weights: Sequence[Weight], shards: int) -> int:
    """Elements that every rank stores of these weights and their gradients."""
    return sum(_rows(weight, shards) * math.prod(weight.shape[1:]) for weight in weights)


def _own(weights: Sequence[Weight], shards: int, shard: int) -> int:
    """Elements of this shard of these weights: `torch.chunk` by rows, so the last shards may be empty."""
    total = 0
    for weight in weights:
        rows = _rows(weight, shards)
        total += max(0, min(rows, weight.shape[0] - shard * rows)) * math.prod(weight.shape[1:])
    return total
