"""Who holds the others up: what follows from the signs of life that processes give again and again."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lesam_dist.parallel.progress import At


class Beat(NamedTuple):
    """A sign of life: it counts up while the process lives, and says where the process is."""

    number: int
    at: At

    def dump(self) -> str:
        return json.dumps([self.number, *self.at])

    @classmethod
    def load(cls, text: str | bytes) -> Beat:
        number, *at = json.loads(text)
        return cls(number, At(*at))


class Look:
    """Compares the beats of all processes, by rank, with those that it was given before.

    Args:
        patience: seconds for which a beat stands still before its process counts as silent.
    """

    def __init__(self, world_size: int, patience: float) -> None:
        self._patience = patience
        self._count, self._since = -1, 0.0
        self._numbers = [-1] * world_size
        self._changed = [0.0] * world_size

    def waits(self, at: At, now: float) -> float:
        """Seconds since this process, which is at ``at``, last got on."""
        if at.moves != self._count:
            self._count, self._since = at.moves, now
            self._numbers = [-1] * len(self._numbers)
        return now - self._since

    def silent(self, beats: Sequence[Beat], now: float) -> list[int]:
        """The ranks whose beat has stood still."""
        for rank, beat in enumerate(beats):
            if beat.number != self._numbers[rank]:
                self._numbers[rank], self._changed[rank] = beat.number, now
        return [rank for rank, changed in enumerate(self._changed) if now - changed >= self._patience]


def behind(beats: Sequence[Beat]) -> list[int]:
    """The ranks that have made the fewest moves, where not all have made the same number."""
    counts = [beat.at.moves for beat in beats]
    lowest = min(counts)
    return [] if lowest == max(counts) else [rank for rank, count in enumerate(counts) if count == lowest]


def usual(beats: Sequence[Beat]) -> At:
    """Where most of them are."""
    return Counter(beat.at for beat in beats).most_common(1)[0][0]


class RunningClock:
    """Seconds for which this process has run: they stand still while it is stopped, or its host sleeps.

    Args:
        longest: seconds between two calls of `now` that count at most.
    """

    def __init__(self, longest: float) -> None:
        self._longest, self._sum, self._last = longest, 0.0, time.monotonic()

    def now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._sum += min(self._last - last, self._longest)
        return self._sum
