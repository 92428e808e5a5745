"""The boards of a run: which it has, and that none of them can end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lesam_dist.config.schema import Config, LoggingConfig
from lesam_dist.errors import UserError
from lesam_dist.train.boards.background import Background
from lesam_dist.train.boards.board import Board, Outcome
from lesam_dist.train.boards.memory import Memory
from lesam_dist.train.boards.mlflow import Mlflow, require_mlflow
from lesam_dist.train.boards.tensorboard import TensorBoard
from lesam_dist.train.boards.wandb import Wandb, require_wandb

_FOLDER = "boards"
_NO_MORE = "no more BOARD events from step {step} on"
_LACKS = "BOARD may lack events that metrics.jsonl has"
_CHECKS = {"wandb": require_wandb, "mlflow": require_mlflow}


def require_boards(config: LoggingConfig) -> None:
    """Refuse what could not be logged, before anything is written; called where the boards are opened, on rank 0.

    Raises:
        UserError: a package is missing, or the service's own settings lack something.
    """
    for name, check in _CHECKS.items():
        if not getattr(config, name):
            continue
        if find_spec(name) is None:
            raise UserError(
                f"logging.{name} is true but the package {name} is not installed: pip install 'lesam-dist[{name}]'."
            )
        check()


def open_boards(config: Config, run_dir: Path, start_step: int) -> Boards:
    """Those that the config asks for.

    Args:
        config: the run.
        run_dir: its folder; the id of the run at each service is kept there.
        start_step: the step that it goes on from.
    """

    def memory(name: str) -> Memory:
        return Memory(run_dir / _FOLDER / f"{name}.json", fresh=config.resume is None)

    boards: dict[str, Board] = {}
    if config.logging.tensorboard:
        boards["TensorBoard"] = TensorBoard(run_dir, start_step)
    if config.logging.wandb:
        kept = memory("wandb")
        boards["W&B"] = Background(partial(Wandb, config, run_dir, kept), kept)
    if config.logging.mlflow:
        kept = memory("mlflow")
        boards["MLflow"] = Background(partial(Mlflow, config, kept), kept)
    return Boards(boards)


class Boards:
    """Several boards as one. One that fails is left out from then on: metrics.jsonl has all that they show.

    Each method returns what to tell the user, one line for each board that has failed.

    Args:
        boards: by the name that the user is told.
    """

    def __init__(self, boards: Mapping[str, Board]) -> None:
        self._boards = dict(boards)

    def scalars(self, values: Mapping[str, float], step: int) -> list[str]:
        """Show values by name; see `Board.scalars`."""
        return self._each(lambda board: board.scalars(values, step), _NO_MORE.format(step=step))

    def go_back(self, step: int) -> list[str]:
        """The run goes on from an earlier step; see `Board.go_back`."""
        return self._each(lambda board: board.go_back(step), _NO_MORE.format(step=step))

    def close(self, outcome: Outcome, seconds: float) -> list[str]:
        """Close all, each within so many seconds; see `Board.close`."""
        told = self._each(lambda board: board.close(outcome, seconds), _LACKS)
        self._boards = {}
        return told

    def _each(self, call: Callable[[Board], None], warning: str) -> list[str]:
        reasons = {name: reason for name, board in self._boards.items() if (reason := _failure(call, board))}
        self._boards = {name: board for name, board in self._boards.items() if name not in reasons}
        return [f"warning: {warning.replace('BOARD', name)} ({reason})." for name, reason in reasons.items()]


def _failure(call: Callable[[Board], None], board: Board) -> str:
    """What went wrong, in one line; "" where nothing did."""
    try:
        call(board)
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # a service's package may raise anything
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""
