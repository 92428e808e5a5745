"""What the processes of a group write down for each other in their store, besides their collectives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import PrefixStore, Store

from lesam_dist.parallel.beats import Beat
from lesam_dist.parallel.progress import At


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        rank: of the process whose fault it is; None where that is unknown.
        message: what stands behind its name: "failed: ...", "was lost: ...".
        said: whether that process prints it itself.
        shared: whether all processes have the same reason to leave.
    """

    rank: int | None
    message: str
    said: bool = False
    shared: bool = False


class Board:
    """One process's connection to the store. Every method raises RuntimeError once the store has gone.

    Args:
        store: that all share; a connection of its own is made, which may wait while others are used.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank = PrefixStore("peers", store.clone()), rank
        self._beats = [f"beat/{rank}" for rank in range(world_size)]
        self._known = [f"known/{rank}" for rank in range(world_size)]

    def tell(self, beat: Beat) -> None:
        self._store.set(self._beats[self._rank], beat.dump())

    def beats(self) -> list[Beat]:
        """The last of every process, by rank; number 0 before all have given one."""
        if not self._store.check(self._beats):
            return [Beat(0, At(0, "starting", None)) for _ in self._beats]
        return [Beat.load(text) for text in self._store.multi_get(self._beats)]

    def publish(self, failure: Failure) -> Failure:
        """Write down why the run ends; returns what stands there: the first that came."""
        standing = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
        return Failure(**json.loads(standing))

    def failure(self) -> Failure | None:
        return Failure(**json.loads(self._store.get("failure"))) if self._store.check(["failure"]) else None

    def acknowledge(self) -> None:
        """That this process knows the failure, so that the store is no longer needed for it."""
        self._store.set(self._known[self._rank], "")

    def has_acknowledged(self, rank: int) -> bool:
        return bool(self._store.check([self._known[rank]]))

    def is_first(self, what: str) -> bool:
        """Whether no process has asked this about ``what`` before."""
        return bool(self._store.add(f"first/{what}", 1) == 1)

    def ask_for_stacks(self, rank: int, key: str) -> None:
        self._store.set(f"stacks/{rank}", key)

    def asked_for_stacks(self) -> str:
        """The key of the last time that another process asked this one; "" for never."""
        key = f"stacks/{self._rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""
