"""The line at the bottom of a terminal while a run trains: how far it is, how fast and how well.

It shows what the log has anyway, so nothing waits for the device on its account. On a narrow terminal the bar becomes
short, and then the facts at the end of `_ORDER` go.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from lesam_dist.tasks.task import Metric

_SHOWN = ("epoch", "loss", "speed", "lr", "rho", "last", "best", "elapsed", "left")  # from left to right
_ORDER = ("epoch", "left", "last", "speed", "best", "loss", "lr", "rho", "elapsed")  # from what stays longest
_GAP = "  "
_SHORTEST, _LONGEST = 6, 30  # columns of the bar


class Bar:
    """What a run is at, on a console that is a terminal; on any other it shows nothing.

    Args:
        console: where to.
        metric: of the evaluations; None shows none.
        total_steps, start_step: of the run, and of this start.
        epochs: of the run; 0 shows none.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        console: Console,
        metric: Metric | None,
        total_steps: int,
        start_step: int,
        epochs: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metric, self._total, self._epochs, self._clock = metric, total_steps, epochs, clock
        self._begin, self._start, self._step = clock(), start_step, start_step
        self._train: Mapping[str, Any] = {}
        self._last: float | None = None
        self._best: float | None = None
        self._progress = Progress(
            _Line(self), console=console, disable=not console.is_terminal, expand=True, refresh_per_second=4
        )
        self._progress.add_task("training")
        self._progress.start()

    def advance(self) -> None:
        """One more update was made."""
        self._step += 1

    def trained(self, values: Mapping[str, Any]) -> None:
        """A training line was logged."""
        self._train = values

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """An evaluation was logged."""
        value = None if self._metric is None else _number(values.get(self._metric.name))
        self._last = value
        if self._metric is None or value is None:
            return
        sign = 1 if self._metric.higher_is_better else -1
        if self._best is None or sign * value > sign * self._best:
            self._best = value

    def go_to(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """The run is at this step, after these lines of its log."""
        self._begin, self._start, self._step = self._clock(), step, step
        self._train, self._last, self._best = {}, None, None
        for line in lines:
            (self.evaluated if line["split"] == "val" else self.trained)(line)

    def stop(self) -> None:
        """Leave the line as it is, and write no more."""
        self._progress.stop()

    def line(self, width: int) -> str:
        """The line on a terminal of so many columns."""
        facts = self._facts()
        chosen: list[str] = []
        left = width - _SHORTEST
        for name in filter(facts.__contains__, _ORDER):
            size = len(facts[name]) + len(_GAP)
            if size > left:
                break
            chosen.append(name)
            left -= size
        share = min(1.0, self._step / self._total) if self._total else 1.0
        size = max(0, min(_LONGEST, left + _SHORTEST, width))
        done = int(share * size)
        parts = [facts[name] for name in _SHOWN if name in chosen]
        parts.insert(1 if "epoch" in chosen else 0, "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * done + "-" * (size - done))
        return _GAP.join(parts)

    def _facts(self) -> dict[str, str]:
        """What is known now, by name."""
        facts: dict[str, str] = {}
        if self._epochs and self._total:
            facts["epoch"] = f"epoch {self._epochs * self._step / self._total:.1f}/{self._epochs}"
        else:
            facts["epoch"] = f"step {self._step}/{self._total}"
        samples = "images" if self._metric is None else self._metric.samples
        for name, key, form in (
            ("loss", "loss", "loss {:.3f}"),
            ("speed", "images_per_s", f"{{:,.0f}} {samples}/s"),
            ("lr", "lr", "lr {:.3g}"),
            ("rho", "rho", "rho {:.3g}"),
        ):
            if (value := _number(self._train.get(key))) is not None:
                facts[name] = form.format(value)
        for name, value in (("last", self._last), ("best", self._best)):
            if value is not None and self._metric is not None:
                number = f"{value:.2f} {self._metric.unit}" if self._metric.unit else f"{value:.4g}"
                facts[name] = f"{self._metric.label if name == 'last' else name} {number}"
        elapsed, made = self._clock() - self._begin, self._step - self._start
        facts["elapsed"] = _duration(elapsed)
        if made:
            facts["left"] = f"{_duration(elapsed * (self._total - self._step) / made)} left"
        return facts


class _Line(ProgressColumn):
    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> _Fitted:
        return _Fitted(self._bar)


class _Fitted:
    """The line, in as many columns as there are when it is written."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self._bar.line(options.max_width)
        if not options.encoding.startswith("utf"):
            text = text.replace("\N{BOX DRAWINGS HEAVY HORIZONTAL}", "#")
        yield Text(text, no_wrap=True, overflow="ellipsis")


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds; days where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"
