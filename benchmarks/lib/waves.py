"""How well lists of small tensors fill a GPU: blocks, idle places, and times predicted from a model of latencies.

The model of one launch, in float32. A block first follows a chain of loads, each of which needs the one before (its
row, the row's elements, the addresses, the data), and then takes as many elements as its threads load at once, one
latency for each such turn. Blocks hide each other's latencies, as many as the chip has room for. So a launch takes the
longest of

- all bytes over the bandwidth,
- the time of all blocks over the number of them that are under way at once,
- the time of its longest block.

"Packed" is an idea that is not built: rows of at most `SMALL` elements share a block, one for each of its warps. A
block that takes one small row after another would gain nothing: its chains would wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lib import traffic
from lib.l2 import CHUNK
from lib.machine import BLOCK_THREADS, LATENCY, slots
from lib.shapes import MODELS, Shape
from lib.traffic import Traffic

CHAIN = 4
"""Loads of which each needs the one before."""
SMALL = 1024
_WARPS = BLOCK_THREADS // 32
_ITEMSIZE = 4
_PER_TURN = {"sum_sq": 8 * BLOCK_THREADS}  # elements; two vectors of 16 bytes per thread
_DEFAULT_PER_TURN = 4 * BLOCK_THREADS


class Filling(NamedTuple):
    """Of one launch.

    Attributes:
        blocks: how many.
        elements: of all rows.
        idle: share of the last wave's places, or of the only one's, that have no block.
        seconds: predicted.
    """

    blocks: int
    elements: int
    idle: float
    seconds: float


def launch(
    kernel: Traffic, sizes: Sequence[int], bandwidth: float, chunk: int = CHUNK, packed: bool = False
) -> Filling:
    """One launch over tensors of these sizes.

    Args:
        kernel: with its passes.
        sizes: elements of each tensor, float32.
        bandwidth: bytes read and written per second.
        chunk: elements per block.
        packed: see the module's text.
    """
    per_turn = _PER_TURN.get(kernel.kernel, _DEFAULT_PER_TURN)
    small = [size for size in sizes if packed and 0 < size <= SMALL]
    rest = [size for size in sizes if size and not (packed and size <= SMALL)]
    turns = [math.ceil(min(chunk, size - start) / per_turn) for size in rest for start in range(0, size, chunk)]
    turns += [math.ceil(max(small[i : i + _WARPS]) * _WARPS / per_turn) for i in range(0, len(small), _WARPS)]
    times = [(CHAIN + count) * LATENCY for count in turns]
    places = slots(kernel.kernel)
    in_bytes = kernel.passes * sum(sizes) * _ITEMSIZE / bandwidth
    seconds = max(in_bytes, sum(times) / places, max(times, default=0.0))
    return Filling(len(times), sum(sizes), -len(times) % places / places, seconds)


def shard(shapes: Sequence[Shape], processes: int) -> list[Shape]:
    """What FSDP2 gives the first of these processes: rows of every tensor, rounded up."""
    return [(math.ceil(shape[0] / processes), *shape[1:]) if shape else shape for shape in shapes]


def llama(layers: int = 32, dim: int = 4096, hidden: int = 14336, kv: int = 1024, words: int = 128256) -> list[Shape]:
    """A language model of Llama 3's shapes, 8 B elements; 65 of its tensors are norms of ``dim`` elements."""
    attention: list[Shape] = [(dim, dim), (kv, dim), (kv, dim), (dim, dim)]
    layer: list[Shape] = [*attention, (hidden, dim), (hidden, dim), (dim, hidden), (dim,), (dim,)]
    return [(words, dim), *layer * layers, (dim,), (words, dim)]


LISTS: dict[str, Callable[[], list[Shape]]] = {
    "1000 of 1000": lambda: [(1000,)] * 1000,
    "5000 scalars": lambda: [()] * 5000,
    "small1000": MODELS["small1000"],
    "resnet50": MODELS["resnet50"],
    "vit_b_16": MODELS["vit_b_16"],
    "llama 8B": llama,
    "resnet50 / 64": lambda: shard(MODELS["resnet50"](), 64),
    "vit_b_16 / 64": lambda: shard(MODELS["vit_b_16"](), 64),
    "llama 8B / 64": lambda: shard(llama(), 64),
}


def seconds(sizes: Sequence[int], bandwidth: float, chunk: int = CHUNK, packed: bool = False) -> float:
    """The kernels of a whole step with SGD."""
    return sum(launch(kernel, sizes, bandwidth, chunk, packed).seconds for kernel in traffic.step("sgd"))
