"""When a pass is done whose communication overlaps with its arithmetic.

All collectives of a pass take turns on the links, in the order in which they are issued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Seconds of a pass: arithmetic; communication; what of it nothing hides."""

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed


class Block(NamedTuple):
    """A unit of FSDP2: seconds of its forward, its backward, its all-gather (twice where it is freed) and of the
    reductions of its gradients."""

    forward: float
    backward: float
    gather: float
    freed: bool
    reduce: float


def reduce_behind(ready: Sequence[float], durations: Sequence[float], compute: float) -> Span:
    """DDP: each bucket is reduced when its gradients are final and the bucket before is done.

    Args:
        ready: seconds from the start of the pass at which each bucket is full.
        durations: of each bucket's reduction.
        compute: of the whole pass.
    """
    end = 0.0
    for at, duration in zip(ready, durations, strict=True):
        end = max(end, at) + duration
    return Span(compute, sum(durations), max(end - compute, 0.0))


def gather_ahead(root: Block, blocks: Sequence[Block]) -> Span:
    """FSDP2: while a block computes, the next one is gathered, and the gradients of the one before are reduced.

    Args:
        root: gathered first and freed last; its arithmetic is taken to be all before the blocks, as a stem's is.
        blocks: in the order of the forward.
    """
    link = issued = root.gather
    clock = link + root.forward
    for block in blocks:
        link = max(link, issued) + block.gather
        issued = max(clock, link)  # when its own weights are there, the next ones are sent for
        clock = issued + block.forward
    link = max(link, clock) + root.gather * root.freed
    clock = link
    for index in reversed(range(len(blocks))):
        if index == len(blocks) - 1:
            link += blocks[index].gather * blocks[index].freed
            clock = link
        arrived = clock
        if index and blocks[index - 1].freed:
            arrived = link = max(link, clock) + blocks[index - 1].gather
        clock += blocks[index].backward
        link = max(link, clock) + blocks[index].reduce
        clock = max(clock, arrived)
    clock += root.backward
    return _span((root, *blocks), max(clock, max(link, clock) + root.reduce))


def in_turn(root: Block, blocks: Sequence[Block]) -> Span:
    """FSDP2 on gloo, whose collectives the process waits for: nothing overlaps."""
    every = (root, *blocks)
    return _span(every, sum(b.forward + b.backward + _communication(b) for b in every))


def _communication(block: Block) -> float:
    return block.gather * (1 + block.freed) + block.reduce


def _span(blocks: Sequence[Block], end: float) -> Span:
    compute = sum(b.forward + b.backward for b in blocks)
    return Span(compute, sum(map(_communication, blocks)), max(end - compute, 0.0))
