"""What this process is doing, as messages about a stalled run and about lack of memory tell it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class At(NamedTuple):
    """A point of the run: the number of ``moves`` until then, what is being done, and in which step (None: before)."""

    moves: int
    what: str
    step: int | None

    def __str__(self) -> str:
        return self.what if self.step is None else f"step {self.step}: {self.what}"


class Progress:
    """Where this process is. All processes of a run make the same moves in the same order.

    Attributes:
        at: the last move.
        resume: the command that goes on with the run, once it has a folder; "" where that is not known.
        stacks: folder for what the threads of a process that holds the others up are doing; None before it is known.
    """

    def __init__(self) -> None:
        self.at = At(0, "starting", None)
        self.resume = ""
        self.stacks: Path | None = None

    def move(self, what: str = "", step: int | None = None) -> None:
        """Say that this process has got on, and what it begins now; costs no more than a tuple.

        Args:
            what: e.g. "pass 1"; "" goes on with the same.
            step: the one that is being made; None is the same as before.
        """
        moves, before, last = self.at
        self.at = At(moves + 1, what or before, last if step is None else step)
