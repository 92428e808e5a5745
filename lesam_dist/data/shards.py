"""Images that lie in tar files: where each one is, and in which order they come one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Part(NamedTuple):
    """Where an image lies: in which tar file (a path, or a URL), from which byte on, and how many bytes."""

    shard: str
    start: int
    size: int


@dataclass(frozen=True)
class Shards:
    """Where each sample of a split lies.

    Attributes:
        files: the tar files, or their URLs.
        shard: number of the file of each sample, ``(N,)``.
        start: byte of the file at which it begins, ``(N,)``.
        size: in bytes, ``(N,)``.
    """

    files: Sequence[str]
    shard: NDArray[Any]
    start: NDArray[Any]
    size: NDArray[Any]

    def part(self, sample: int) -> Part:
        """Where a sample lies."""
        return Part(self.files[int(self.shard[sample])], int(self.start[sample]), int(self.size[sample]))

    def take(self, samples: NDArray[np.int64]) -> Shards:
        """Those of some samples alone."""
        return Shards(self.files, self.shard[samples], self.start[samples], self.size[samples])

    def sequential_order(self, *, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
        """Samples so that a stretch of them lies in few files: see `lesam_dist.data.order.windowed_order`."""
        from lesam_dist.data.order import windowed_order

        stored = np.lexsort((self.start, self.shard))
        ends = np.flatnonzero(np.diff(self.shard[stored])) + 1
        return windowed_order(np.split(stored, ends), seed=seed, epoch=epoch, window=window)
