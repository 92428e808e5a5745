"""Which part of a gradient the climb or the update finds in L2, where the norm has just read it: a simulation.

The model: tiles of 8 KiB; programs start in the order of their blocks, as many as the chip has room for, and take
turns, a tile of each tensor at a time; what was not used for longest is thrown out (LRU). Real programs do not keep
step and a real cache is no LRU, so it tells 0.05 from 0.5 of a pass, and no more.

`Walk` says in which order the second kernel goes:

- blocks: from the last one to the first, instead of as the norm did;
- chunks: each program from the end of its chunk to the start. As many chunks as the chip works on at once, 50 to 70 MB
  of a float32 gradient, are more than L2 holds: what lies there are the ends of the last chunks, not the last chunks;
- hints: what the kernel reads and writes beside the gradient is marked to be thrown out first, and displaces nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from lib.machine import slots

CHUNK = 16384
TILE_BYTES = 8192
_MOST_TILES = 32768  # 268 MB, four times what is under way

Tile = tuple[int, int, int]  # tensor, block, position in its chunk


class Walk(NamedTuple):
    """How the second kernel goes over the blocks that the first one took in order."""

    blocks: bool = False
    chunks: bool = False
    hints: bool = False

    def __str__(self) -> str:
        parts = [name for name, on in zip(("blocks", "chunks"), self, strict=False) if on]
        return " and ".join(parts or ["none"]) + (", hints" if self.hints else "")


WALKS = (
    Walk(),
    Walk(blocks=True),
    Walk(blocks=True, chunks=True),
    Walk(blocks=True, hints=True),
    Walk(blocks=True, chunks=True, hints=True),
)


def found(
    numel: int,
    itemsize: int,
    tensors: int,
    walk: Walk,
    cache: float,
    *,
    first: str = "sum_sq",
    second: str = "perturb",
    chunk: int = CHUNK,
) -> float:
    """The share of the gradient, in [0, 1], that the second kernel finds in L2: passes that it does not make.

    Args:
        numel: elements of the gradient, as of one tensor.
        itemsize: bytes of an element.
        tensors: different ones that the second kernel reads or writes, with the gradient: 3 for perturb.
        walk: the order of the second kernel; the first one goes from the start to the end.
        cache: bytes of L2 that are of use.
        first, second: the kernels, which decide how many blocks are under way.
        chunk: elements per block.
    """
    tiles = max(1, chunk * itemsize // TILE_BYTES)
    all_blocks = -(-numel // chunk)
    blocks = min(all_blocks, _MOST_TILES // tiles)  # beyond these as much is found, of a larger gradient
    lru = _Lru(int(cache // TILE_BYTES))
    for block, tile in _turns(blocks, tiles, slots(first), Walk()):
        lru.use((0, block, tile))
    hits = 0
    for block, tile in _turns(blocks, tiles, slots(second), walk):
        hits += lru.use((0, block, tile))
        if not walk.hints:
            for tensor in range(1, tensors):
                lru.use((tensor, block, tile))
    return hits / (all_blocks * tiles) if blocks else 0.0


class _Lru:
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lines: OrderedDict[Tile, None] = OrderedDict()

    def use(self, tile: Tile) -> bool:
        """Touch a tile; whether it was there."""
        hit = tile in self._lines
        self._lines[tile] = None
        self._lines.move_to_end(tile)
        if len(self._lines) > self._capacity:
            self._lines.popitem(last=False)
        return hit


def _turns(blocks: int, tiles: int, under_way: int, walk: Walk) -> Iterator[tuple[int, int]]:
    """(block, tile) in the order in which programs that keep step take them."""
    waiting = iter(range(blocks)[::-1] if walk.blocks else range(blocks))
    running = [(block, 0) for _, block in zip(range(under_way), waiting, strict=False)]
    while running:
        still = []
        for block, turn in running:
            yield block, tiles - 1 - turn if walk.chunks else turn
            if turn + 1 < tiles:
                still.append((block, turn + 1))
            elif (follower := next(waiting, None)) is not None:
                still.append((follower, 0))
        running = still
