"""How the processes of a run agree while they save: over the run's group, or over one that a thread has for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from lesam_dist.parallel.processes import Distributed

T = TypeVar("T")


class Channel(Protocol):
    """What `Distributed` has of it."""

    @property
    def rank(self) -> int:
        """Of this process."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""


class SideChannel:
    """A gloo group of all processes, for one thread at a time, beside whatever the others do; made by all at once."""

    def __init__(self, world: Distributed) -> None:
        self.rank, self._world_size = world.rank, world.world_size
        self._group: Any = dist.new_group(backend="gloo") if world.world_size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        values = [value] * self._world_size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


@dataclass(frozen=True)
class Problem:
    """Why something failed on a rank."""

    text: str
    is_disk: bool  # an OSError: no space, no permission, a file system that has gone


class FailedError(Exception):
    """Raised on every rank where any rank has failed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def on_all(channel: Channel, function: Callable[[], T]) -> list[T]:
    """What the function returns on each rank, by rank.

    Raises:
        FailedError: where it raised on any; on every rank, for the same reason.
    """
    results: list[T | Problem] = channel.gather(_attempt(function))
    return [_unless_failed(result) for result in results]


def on_first(channel: Channel, function: Callable[[], T]) -> T:
    """What the function returns on rank 0; the others wait for it. Raises as `on_all`."""
    result: T | Problem = channel.share(_attempt(function) if channel.rank == 0 else None)
    return _unless_failed(result)


def _attempt(function: Callable[[], T]) -> T | Problem:
    try:
        return function()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return Problem(f"{error.strerror or error}{where}", is_disk=True)
    except Exception as error:  # the others must not wait for this rank for ever
        return Problem(f"{type(error).__name__}: {error}", is_disk=False)


def _unless_failed(result: T | Problem) -> T:
    if isinstance(result, Problem):
        raise FailedError(result)
    return result
