"""The line that a terminal shows: what is in it at each width, and that it says what the log says."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lesam_dist.tasks.classification.task import ACC1
from lesam_dist.tasks.task import Metric
from lesam_dist.train.bar import Bar
from lesam_dist.train.telemetry import RunLog

TRAIN = {"loss": 2.3125, "lr": 0.08344, "rho": 0.0712, "images_per_s": 1234.4, "grad_norm": 1.0}
ALL = ["epoch", "loss", "images/s", "lr", "rho", "top-1", "best", "0:10:00", "left"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bar(metric: Metric | None = ACC1, width: int = 120, start: int = 0) -> tuple[Bar, Clock, io.StringIO]:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    return Bar(console, metric, 900, start, 90, clock), clock, file


def full(width: int = 120) -> Bar:
    found, clock, _ = bar(width=width)
    for _ in range(225):
        found.advance()
    clock.now = 600
    found.trained(TRAIN)
    for value in (72.1, 71.234):
        found.evaluated({"acc1": value, "loss": 1.0})
    found.stop()
    return found


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(200, []), (120, ["0:10:00"]), (80, ["loss", "lr", "rho", "0:10:00"]), (40, ["loss", "lr", "rho", "images/s"])],
)
def test_what_fits(width: int, left_out: list[str]) -> None:
    line = full().line(width)
    assert len(line) <= width
    there = [name for name in ALL if re.search(rf"(^| ){re.escape(name)}( |$)", line)]
    assert not set(there) & set(left_out)
    if width >= 80:
        assert there == [name for name in ALL if name not in left_out], "in this order"
        assert line.startswith("epoch 22.5/90  \N{BOX DRAWINGS HEAVY HORIZONTAL}")


def test_numbers() -> None:
    line = full().line(200)
    assert "loss 2.312  1,234 images/s  lr 0.0834  rho 0.0712  top-1 71.23 %  best 72.10 %" in line
    assert line.endswith("0:10:00  0:30:00 left"), "a quarter is done in ten minutes"
    assert line.count("\N{BOX DRAWINGS HEAVY HORIZONTAL}") == int(0.25 * 30)


def test_no_line_is_ever_too_long(seed: int) -> None:
    draw = random.Random(seed)
    found, clock, _ = bar()
    for _ in range(200):
        clock.now += 10 ** draw.uniform(-2, 5)
        for _ in range(draw.randrange(4)):
            found.advance()
        keys = draw.sample([*TRAIN, "acc1"], 3)
        values: dict[str, Any] = {key: draw.choice([1e-9, 1.5, 12345678.9, float("nan"), None]) for key in keys}
        draw.choice([found.trained, found.evaluated])(values)
        width = draw.randrange(1, 160)
        assert len(found.line(width)) <= width
    found.stop()


def test_a_lower_one_is_better() -> None:
    found, _, _ = bar(Metric("loss", "loss", higher_is_better=False, samples="sentences"))
    for value in (2.0, 1.0, 3.0):
        found.evaluated({"loss": value})
    found.trained({"images_per_s": 10.0})
    found.stop()
    assert "10 sentences/s  loss 3  best 1" in found.line(120)


def test_a_resumed_run_shows_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its log, without the lines of the steps that are made again; the rest of the time is of this start."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")

    def log(step: int, *more: float) -> str:
        opened = RunLog(tmp_path, 40, step, metric=ACC1, epochs=4)
        for value in more:
            step += 10
            opened.write("train", step, step / 10, TRAIN)
            opened.write("val", step, step / 10, {"acc1": value, "loss": 1.0})
        line = opened._bar.line(120)
        opened.close("stopped", 1.0)
        return line

    assert "top-1 30.00 %  best 50.00 %" in log(0, 40.0, 50.0, 30.0)
    resumed = log(10)
    assert "top-1 40.00 %  best 40.00 %" in resumed
    assert resumed.startswith("epoch 1.0/4 ")
    assert " left" not in resumed


def test_it_is_drawn_on_a_terminal_alone() -> None:
    for is_terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=is_terminal, width=100, color_system=None)
        found = Bar(console, ACC1, 10, 0, 1)
        found.advance()
        found.trained(TRAIN)
        found.stop()
        assert ("loss 2.312" in file.getvalue()) == is_terminal
