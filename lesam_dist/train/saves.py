"""What a run saves, and goes on from: the content of its checkpoints, and the step of the last one."""

from __future__ import annotations

from typing import Any

from lesam_dist.train.cadence import Cadence
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.divergence import all_finite
from lesam_dist.train.guard import LossGuard
from lesam_dist.train.run_state import RunState


class Saves:
    """Saves a run and loads it; all processes call each method alike.

    Args:
        checkpoints: where to; None for a run that writes nothing, of which nothing is saved or found.
        state: of the run.
        guard: of the run, which is saved with it where it is on.
        cadence: told of each save.
        steps_per_epoch: of the run.

    Attributes:
        step: of the last save, which is on disk or on its way to it, or of what was loaded since; None where there was
            none, or the last one failed.
    """

    def __init__(
        self,
        checkpoints: Checkpointer | None,
        state: RunState,
        guard: LossGuard,
        cadence: Cadence,
        steps_per_epoch: int,
    ) -> None:
        self._checkpoints, self._state, self._guard, self._cadence = checkpoints, state, guard, cadence
        self._steps_per_epoch = steps_per_epoch
        self.step: int | None = None

    def save(self, step: int, evaluation: dict[str, float] | None, *, final: bool) -> None:
        """Save the run as it is.

        Args:
            step: updates made so far.
            evaluation: of these weights; None where they have not been evaluated.
            final: nothing comes after this one.

        Raises:
            DivergedError: too many steps in a row were not finite: older checkpoints are better.
            UserError: see `Checkpointer.save`.
        """
        if self._checkpoints is None:
            return
        state, world = self._state, self._state.world
        world.move("saving a checkpoint")
        weights = [*state.model.parameters(), *state.model.buffers()]
        in_a_row, finite = world.mean([state.nonfinite.in_a_row, all_finite(weights)])
        state.nonfinite.require_few(step, in_a_row, self._checkpoints)
        epoch, rest = divmod(step, self._steps_per_epoch)
        progress = {"epoch": epoch, "evaluation": evaluation, **state.progress()}
        progress["guard"] = self._guard.state() if self._guard.is_on else None
        saved = self._checkpoints.save(
            step,
            state.model,
            state.optimizer,
            progress,
            state.ema,
            own=state.own(),
            finite=in_a_row == 0 and finite == 1,
            epoch_end=None if rest else epoch,
            final=final,
        )
        self.step = step if saved else None
        self._cadence.saved()

    def amend(self, progress: dict[str, Any]) -> None:
        """Add to the progress in the checkpoint of `step`, or replace parts of it."""
        if self._checkpoints is not None and self.step is not None:
            self._checkpoints.amend(self.step, progress)

    def wait(self) -> bool:
        """Until the save in flight is on disk, or has failed; see `Checkpointer.wait`."""
        return self._checkpoints is None or self._checkpoints.wait()

    def load(self) -> dict[str, Any] | None:
        """Go to where the newest whole checkpoint is, and return its progress; None where there is none."""
        if self._checkpoints is None:
            return None
        state, world = self._state, self._state.world
        world.move("loading a checkpoint")
        loaded = self._checkpoints.load_latest(state.model, state.optimizer, state.ema)
        if world.is_main:
            for fault in loaded.damaged:
                print(f"warning: {fault}; going on from an older checkpoint", flush=True)
        progress = loaded.progress
        if progress is not None:
            state.check(progress)
            state.restore(progress, loaded.own)
            self.step = progress["step"]
        return progress
