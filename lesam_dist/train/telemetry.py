"""What a run writes for people: metrics.jsonl, the terminal, and its boards. Rank 0 only."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from lesam_dist.tasks.task import Metric
from lesam_dist.train.bar import Bar
from lesam_dist.train.boards.board import Outcome
from lesam_dist.train.boards.boards import Boards
from lesam_dist.train.lines import Lines

METRICS = "metrics.jsonl"
_SUPERSEDED = "metrics.superseded.jsonl"


class RunLog:
    """Writes one JSON object per logged step and per evaluation, and shows the run's progress.

    Keys of a line: ``step`` (updates made so far), ``epoch`` (fractional), ``split`` ("train" or "val"), then the
    values; numbers that are not finite are written as null.

    Args:
        run_dir: existing folder; None writes no files (a dry run).
        total_steps: for the progress bar.
        start_step: the step that a resumed run goes on from. Lines of later steps, left by the run that was cut off,
            move to metrics.superseded.jsonl.
        boards: show each line too; None for none.
        evaluated: the evaluation after ``start_step`` is known; otherwise its line moves too.
        metric: of the evaluations, for the progress bar.
        epochs: of the run, for the progress bar.
    """

    def __init__(
        self,
        run_dir: Path | None,
        total_steps: int,
        start_step: int = 0,
        boards: Boards | None = None,
        *,
        evaluated: bool = True,
        metric: Metric | None = None,
        epochs: int = 0,
    ) -> None:
        self._run_dir, self._boards = run_dir, boards or Boards({})
        self._open(start_step, evaluated)
        self.console = Console()
        self._bar = Bar(self.console, metric, total_steps, start_step, epochs)
        self._bar.go_to(start_step, self._logged())

    def advance(self) -> None:
        """One more update was made."""
        self._bar.advance()

    def write(self, split: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Log one line of ``values`` everywhere."""
        line = {"step": step, "epoch": round(epoch, 4), "split": split}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        if self._file and (news := self._file.append(json.dumps(line))):
            self.print(news)
        for news in self._boards.scalars({f"{split}/{name}": value for name, value in values.items()}, step):
            self.print(news)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        (self._bar.evaluated if split == "val" else self._bar.trained)(values)
        if not (self.console.is_terminal and split == "train"):
            self.print(f"[{split}] step {step}  epoch {epoch:.2f}  {shown}")

    def go_back(self, step: int, *, evaluated: bool) -> None:
        """The run goes on from an earlier step: as when it is resumed from there."""
        self._close_file()
        self._open(step, evaluated)
        for news in self._boards.go_back(step):
            self.print(news)
        self._bar.go_to(step, self._logged())

    def _open(self, start_step: int, evaluated: bool) -> None:
        self._file: Lines | None = None
        if self._run_dir is not None:
            _supersede(self._run_dir, start_step, evaluated)
            self._file = Lines(self._run_dir / METRICS)

    def _logged(self) -> list[dict[str, Any]]:
        """The lines so far, for the bar: a log is long, and without a terminal nobody looks at it."""
        return [] if self._run_dir is None or not self.console.is_terminal else read_metrics(self._run_dir)

    def print(self, text: str) -> None:
        """A plain line on the terminal, above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self, outcome: Outcome, seconds: float) -> None:
        """Flush and close everything; each board within so many seconds."""
        self._bar.stop()
        self._close_file()
        for news in self._boards.close(outcome, seconds):
            self.print(news)

    def _close_file(self) -> None:
        if self._file:
            self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; what is no such line, as one that was cut off in writing, is left out."""
    return [line for _, line in _lines(run_dir) if line is not None]


def _lines(run_dir: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Each line as text, and as what `RunLog.write` wrote; None for anything else."""
    return [(text, _parsed(text)) for text in (run_dir / METRICS).read_text(errors="replace").split("\n") if text]


def _parsed(text: str) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("step"), int) and line.get("split") in ("train", "val"):
            return line
    return None


def _supersede(run_dir: Path, start_step: int, evaluated: bool) -> None:
    """Keep the lines up to ``start_step``; move later ones, and what `RunLog` did not write, to another file."""
    if not (run_dir / METRICS).exists():
        return
    kept: list[str] = []
    moved: list[str] = []
    for text, line in _lines(run_dir):
        stays = line is not None and line["step"] <= start_step - (line["split"] == "val" and not evaluated)
        (kept if stays else moved).append(f"{text}\n")
    with (run_dir / _SUPERSEDED).open("a", encoding="utf-8") as file:
        file.writelines(moved)
    aside = run_dir / f".{METRICS}.partial"
    aside.write_text("".join(kept), encoding="utf-8")
    aside.replace(run_dir / METRICS)
