"""A service across the network as a board: in a thread of its own, for which no step waits, nor the end for long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Protocol

from lesam_dist.train.boards.board import Outcome
from lesam_dist.train.boards.memory import Memory


class Service(Protocol):
    """A run at a service, once it is open; its methods may take as long as they need."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send values; return when they are sent, or safe on this disk."""

    def close(self, outcome: Outcome) -> None:
        """Send what is left, and say how the run ended."""


class Background:
    """Opens a service and gives it values in the order in which they come, while the caller goes on.

    After an exception in the service nothing more is given to it; the next call here raises that exception.

    Args:
        begin: opens the service.
        memory: of what the service has.
    """

    def __init__(self, begin: Callable[[], Service], memory: Memory) -> None:
        self._begin, self._memory = begin, memory
        self._waiting: SimpleQueue[tuple[dict[str, float], int] | Outcome] = SimpleQueue()
        self._fault: Exception | None = None
        # A daemon: whatever the service waits for, the process can end.
        self._thread = threading.Thread(target=self._work, name="board", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Have values sent.

        Raises:
            Exception: what the service has raised since the last call.
        """
        self._require_well()
        self._waiting.put((dict(values), step))

    def go_back(self, step: int) -> None:
        """Nothing: `Memory` knows what has been sent."""

    def close(self, outcome: Outcome, seconds: float) -> None:
        """Have the run closed, and wait for that up to so many seconds.

        Raises:
            TimeoutError: it takes longer.
            Exception: as `scalars`.
        """
        self._waiting.put(outcome)
        self._thread.join(seconds)
        self._require_well()
        if self._thread.is_alive():
            raise TimeoutError(f"it has not answered for {seconds:g} s")

    def _require_well(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _work(self) -> None:
        try:
            service = self._begin()
            while not isinstance(item := self._waiting.get(), str):
                values, step = item
                if values := self._memory.unsent(values, step):
                    service.scalars(values, step)
                    self._memory.sent(values, step)
            service.close(item)
        except Exception as error:
            self._fault = error
