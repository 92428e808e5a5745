"""What a run logs over its epochs: losses, accuracy, calibration error and learning rate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from lesam_dist.report.blocks import Chart, Line, Section, Style, Table, Text
from lesam_dist.report.grouping import Group
from lesam_dist.report.results import Result
from lesam_dist.report.statistics import Spread
from lesam_dist.report.summary import percent, plain
from lesam_dist.tasks.task import Metric

_WINDOWS = 300  # of a training curve, at most: more is not seen
_STEEP = 30.0  # highest over lowest loss from which a logarithm shows more
_BAND = "Mean over seeds; band: ± one standard deviation, of the points that two seeds or more have."


class _Kind(NamedTuple):
    split: str
    key: str
    title: str
    unit: str


_CURVES = (
    _Kind("val", "robust_acc1", "Validation accuracy under attack", "top-1, %"),
    _Kind("val", "loss", "Validation loss", "loss"),
    _Kind("train", "loss", "Training loss", "loss of a step's batch"),
    _Kind("val", "ece", "Calibration error", "ECE"),
    _Kind("train", "lr", "Learning rate", "learning rate"),
)
_GROUPS = ("many", "medium", "few")  # of a long tail's classes
_LAST = {
    "acc5": "top-5",
    "robust_acc1": "top-1 under attack",
    **{name: f"{name}-shot" for name in _GROUPS},
    "loss": "loss",
    "ece": "ECE",
    "ema_loss": "loss, averaged weights",
}


def curves(results: Sequence[Result]) -> Section:
    """A chart for each quantity that was logged, and the table of last and best."""
    section = Section("curves", "Curves")
    for kind in (*_of_metric(results[0].metric), *_CURVES):
        lines = [line for result in results if (line := _line(result.group, kind))]
        if lines:
            section.blocks.append(_chart(kind, lines))
    if any(line.low for block in section.blocks if isinstance(block, Chart) for line in block.lines):
        section.blocks.append(Text(_BAND, "note"))
    section.blocks.append(_ends(results))
    return section


def _of_metric(metric: Metric) -> list[_Kind]:
    if metric.name == "loss":
        return []  # which is drawn anyway
    name = "accuracy" if metric.name == "acc1" else metric.label
    kind = _Kind("val", metric.name, f"Validation {name}", f"{metric.label}, {metric.unit}".rstrip(", "))
    return [kind, kind._replace(key=f"ema_{metric.name}", title=f"{kind.title} of the averaged weights")]


def _ends(results: Sequence[Result]) -> Table:
    """What the last evaluation said beside the metric of the summary."""
    metric = results[0].metric
    titles = _LAST | {f"ema_{metric.name}": f"{metric.label}, averaged weights"}
    columns = [name for name in titles if name != metric.name and any(result.last(name) for result in results)]
    header = ["method", "best epoch", *(titles[name] for name in columns)]
    rows = []
    for result in results:
        cells = [(percent if "acc" in n or n in _GROUPS else plain)(result.last(n)) for n in columns]
        rows.append([result.name, plain(result.best_epoch()), *cells])
    note = "After the last epoch, mean ± standard deviation over the seeds that finished; best epoch: of the "
    note += f"{metric.label}."
    return Table(header, rows, note, [result.group.style for result in results])


def over_seeds(name: str, style: Style, runs: Sequence[Mapping[float, float | None]], *, marks: bool = False) -> Line:
    """The mean of several runs' points by x, with a band where there are two or more; None is left out."""
    by_x: defaultdict[float, list[float]] = defaultdict(list)
    for points in runs:
        for x, y in points.items():
            by_x[x] += [] if y is None else [y]
    places = sorted(by_x)
    spreads = [Spread.of(by_x[x]) if by_x[x] else None for x in places]
    means = [None if each is None else each.mean for each in spreads]
    about = ["" if each is None or each.n < 2 else f"± {each.std:.2g}, n = {each.n}" for each in spreads]
    if not any(about):
        return Line(name, places, means, style, marks=marks)
    low = [None if each is None else each.low for each in spreads]
    high = [None if each is None else each.high for each in spreads]
    return Line(name, places, means, style, low, high, about, marks=marks)


def is_steep(lines: Sequence[Line]) -> bool:
    """Whether positive values spread so far that a logarithm shows more."""
    known = [value for line in lines for value in (*line.y, *(line.high or ())) if value is not None]
    return bool(known) and 0 < _STEEP * min(known) < max(known)


def above_zero(line: Line) -> Line:
    """With its band cut off somewhat below its lowest point, as a logarithmic axis has no zero."""
    floor = min((y for y in line.y if y is not None), default=0.0) / 3
    return replace(line, low=line.low and [None if low is None else max(low, floor) for low in line.low])


def _line(group: Group, kind: _Kind) -> Line | None:
    logged = [run.of(kind.split, kind.key) for run in group.runs]
    points = [[(float(line["epoch"]), value) for line, value in each] for each in logged]
    if not any(points):
        return None
    if kind.split == "val":
        return over_seeds(group.name, group.style, list(map(dict, points)), marks=max(map(len, points)) <= 40)
    width = max(_gap(each) for each in points)
    width = max(width, group.runs[0].config.epochs / _WINDOWS)
    return over_seeds(group.name, group.style, _windows(points, width))


def _gap(points: Sequence[tuple[float, float | None]]) -> float:
    gaps = [b - a for (a, _), (b, _) in pairwise(points)]
    return statistics.median(gaps) if gaps else 0.0


def _windows(runs: Sequence[Sequence[tuple[float, float | None]]], width: float) -> list[dict[float, float | None]]:
    """Each run's mean in windows of so many epochs, at x that all runs share: seeds may have been logged differently.

    A window is around a multiple of its width, as logged steps are.
    """
    epochs: defaultdict[int, list[float]] = defaultdict(list)
    values: list[defaultdict[int, list[float]]] = []
    for points in runs:
        values.append(defaultdict(list))
        for epoch, value in points:
            index = round(epoch / width) if width else 0
            epochs[index].append(epoch)
            values[-1][index] += [] if value is None else [value]
    place = {index: statistics.fmean(found) for index, found in epochs.items()}
    return [
        {place[index]: statistics.fmean(found) if found else None for index, found in each.items()} for each in values
    ]


def _chart(kind: _Kind, lines: Sequence[Line]) -> Chart:
    steep = kind.key == "loss" and is_steep(lines)
    longest = max(len(line.x) for line in lines)
    return Chart(
        f"{kind.split}-{kind.key}",
        kind.title,
        "epoch",
        kind.unit,
        lines if not steep else list(map(above_zero, lines)),
        log_y=steep,
        integer_x=kind.split == "val" and longest > 1,
    )
