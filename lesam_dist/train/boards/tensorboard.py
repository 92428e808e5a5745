"""TensorBoard: events in RUN_DIR/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lesam_dist.train.boards.board import Outcome


class TensorBoard:
    """Writes events. TensorBoard hides those of steps after ``start_step`` that a run left which was cut off.

    Args:
        run_dir: existing folder.
        start_step: the step that the run goes on from.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._open(start_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self, outcome: Outcome, seconds: float) -> None:
        self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)
