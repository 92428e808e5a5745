"""When a run saves a checkpoint."""

from __future__ import annotations

import time

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.parallel.processes import Distributed


class Cadence:
    """By epochs, by steps, and by rank 0's clock, which the other processes learn of through `Distributed.agreed`.

    Args:
        config: how often.
        epochs: of the run.
        steps_per_epoch: of the run.
        world: this process among all.
    """

    def __init__(self, config: CheckpointConfig, epochs: int, steps_per_epoch: int, world: Distributed) -> None:
        self._config, self._epochs, self._steps_per_epoch, self._world = config, epochs, steps_per_epoch, world
        self._since = time.monotonic()

    def look_at_clock(self) -> None:
        """Ask all processes to save where the last checkpoint is old enough."""
        minutes = self._config.every_minutes
        if minutes is not None and self._world.is_main and time.monotonic() - self._since >= 60 * minutes:
            self._world.agreed.request("save")
            self.saved()  # asked once

    def saved(self) -> None:
        """A checkpoint has been made, or tried."""
        self._since = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether one is made after ``step`` steps of the run, whatever the clock says."""
        every = self._config.every_steps
        if every is not None and step % every == 0:
            return True
        epoch, rest = divmod(step, self._steps_per_epoch)
        return rest == 0 and (epoch == self._epochs or epoch % self._config.every_epochs == 0)
