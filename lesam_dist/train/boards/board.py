"""What every board is to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ended: as it was to; saved and asked to stop, to be gone on with; by an error."""


class Board(Protocol):
    """Shows a run's scalars. Rank 0 alone has boards; whatever a method raises, the run goes on without this one."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show values by name, as "train/loss", after ``step`` updates."""

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: what was shown of later ones comes again, or did not happen."""

    def close(self, outcome: Outcome, seconds: float) -> None:
        """Send what has not been sent, and wait for that up to so many seconds."""
