"""The best epoch of a run: of what counts of its log, whatever was done again."""

from __future__ import annotations

import math
from pathlib import Path

from lesam_dist.tasks.classification.task import ACC1
from lesam_dist.tasks.task import Metric
from lesam_dist.train.best import best_evaluation
from lesam_dist.train.boards.board import Outcome
from lesam_dist.train.ending import describe_results
from lesam_dist.train.telemetry import METRICS, RunLog
from tests.conftest import Command

LOSS = Metric("loss", "loss", higher_is_better=False)
FINISHED: Outcome = "finished"


def log(run_dir: Path, start: int, accuracies: list[float]) -> RunLog:
    """A log of epochs of ten steps, from an epoch on."""
    found = RunLog(run_dir, 100, 10 * start)
    for epoch, value in enumerate(accuracies, start + 1):
        found.write("train", 10 * epoch, epoch, {"loss": 0.0, "acc1": 100.0})
        found.write("val", 10 * epoch, epoch, {"acc1": value, "loss": value / 10})
    return found


def test_what_a_run_left_behind_does_not_count(tmp_path: Path) -> None:
    """Neither what was evaluated before it was resumed from an earlier step, nor before it went back."""
    log(tmp_path, 0, [50.0, 60.0, 90.0]).close(FINISHED, 1)
    assert best_evaluation(tmp_path, ACC1) == (90.0, 3)
    again = log(tmp_path, 2, [55.0, 80.0])
    assert best_evaluation(tmp_path, ACC1) == (80.0, 4)
    again.go_back(20, evaluated=True)
    again.close(FINISHED, 1)
    assert best_evaluation(tmp_path, ACC1) == (60.0, 2)
    assert best_evaluation(tmp_path, LOSS) == (5.0, 1)


def test_the_first_of_several_and_numbers_alone(tmp_path: Path) -> None:
    log(tmp_path, 0, [math.nan, 70.0, 70.0, math.inf]).close(FINISHED, 1)
    assert best_evaluation(tmp_path, ACC1) == (70.0, 2)
    assert best_evaluation(tmp_path, Metric("f1", "F1")) is None
    (tmp_path / METRICS).unlink()
    assert best_evaluation(tmp_path, ACC1) is None


def test_the_end_of_a_run_says_both(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    status, out, _ = command(*small, "--run_dir", tmp_path)
    best = best_evaluation(tmp_path, ACC1)
    assert status == 0
    assert best is not None
    last = next(line for line in out.splitlines() if line.startswith("top-1 "))
    said = ", the best of all" if best.epoch == 3 else f"; best after epoch {best.epoch:g}: {best.value:.2f} %, chosen"
    assert said in last


def test_without_a_log() -> None:
    """As of a dry run."""
    text = describe_results({"acc1": 90.0, "samples": 10.0}, 3, ACC1, None)
    assert text == "top-1 90.00 % of 10 validation images after epoch 3"
