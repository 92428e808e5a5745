"""What all processes do after one and the same step, at the wish of any of them: save, or save and stop."""

from __future__ import annotations

from typing import Literal

Wish = Literal["save", "stop"]


class Agreed:
    """The wishes of a process that is alone."""

    def __init__(self) -> None:
        self._wish: Wish | None = None

    def request(self, wish: Wish) -> None:
        """Ask for it, from any process, thread or signal handler. Of both at one time "stop" wins, which saves too."""
        if self._wish != "stop":
            self._wish = wish

    def due(self, step: int) -> Wish | None:
        """What is to be done now, the same on all processes.

        Args:
            step: steps made so far in this run; every process calls it after every step.
        """
        wish, self._wish = self._wish, None
        return wish

    @property
    def stopping(self) -> bool:
        """Whether any process has asked to stop: what saves nothing that the last checkpoint lacks may be left out."""
        return self._wish == "stop"
