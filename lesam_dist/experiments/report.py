"""What an experiment leaves behind: a table on the terminal and as Markdown, the numbers as JSON, and a plot."""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesam_dist.errors import UserError
from lesam_dist.experiments.runs import Outcome

if TYPE_CHECKING:
    from lesam_dist.tasks.task import Metric

_POINTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "alpha": 0.5, "color": "tab:blue"}
_MEANS: dict[str, Any] = {"capsize": 4, "marker": "D", "markersize": 6, "color": "black", "zorder": 3}


def note(metric: Metric) -> str:
    """What the numbers of a table are."""
    what = metric.label[:1].upper() + metric.label[1:]
    return (
        f"{what} on the validation {metric.samples} after the last epoch: mean and standard deviation over seeds. Best "
        f"epoch: of each run, chosen on the same {metric.samples}, which flatters; it is not what is compared. Cost: "
        "forward and backward passes of a step; SGD makes one."
    )


def plus_minus(value: float, spread: float, *, signed: bool = False) -> str:
    """``value ± spread`` with two decimals; without a spread where there is none, in words where a run diverged."""
    if math.isnan(value):
        return "diverged"
    text = f"{value:{'+' if signed else ''}.2f}"
    return text if math.isnan(spread) else f"{text} ± {spread:.2f}"


def outcome_numbers(outcome: Outcome, metric: Metric) -> dict[str, Any]:
    """An outcome for JSON, which has no nan."""

    def of(values: Sequence[float], mean: float, std: float) -> dict[str, Any]:
        return {metric.name: [number(value) for value in values], "mean": number(mean), "std": number(std)}

    best = of(outcome.best, outcome.best_mean, outcome.best_std)
    return of(outcome.values, outcome.mean, outcome.std) | {"best_epoch": best, "cost": outcome.cost}


def number(value: float) -> float | None:
    """For JSON: None in place of nan."""
    return None if math.isnan(value) else value


def report(
    run_dir: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str, numbers: dict[str, Any]
) -> None:
    """Show the table, and write ``run_dir/name.md`` and ``run_dir/name.json``.

    Raises:
        UserError: where they cannot be written.
    """
    import torch  # here, as in `plot`: a wrong flag is refused without it

    show(header, rows)
    text = markdown(header, rows)
    print(note)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    try:
        (run_dir / f"{name}.md").write_text(f"{text}\n{note}\n", encoding="utf-8")
        (run_dir / f"{name}.json").write_text(json.dumps(numbers | {"versions": versions}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run_dir '{run_dir}' cannot be written: {error.strerror or error}.") from error
    print(f"results: {run_dir}  ({name}.md, {name}.json, {name}.png)")


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, as Markdown where there is no terminal that is wide enough for it."""
    from rich.console import Console
    from rich.table import Table

    console, text = Console(), markdown(header, rows)
    if console.is_terminal and console.width >= len(text.split("\n", 1)[0]):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        print(text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))} |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def are_spaced_by_factors(values: Sequence[float]) -> bool:
    """Whether at least three positive values lie more evenly by their logarithms than by themselves, as 0.01, 0.1, 1.

    By the spread of the gaps between neighbours, each as a share of the mean gap.
    """
    places = sorted(values)
    if len(places) < 3 or places[0] <= 0:
        return False
    return _unevenness([math.log(place) for place in places]) < _unevenness(places)


def _unevenness(places: Sequence[float]) -> float:
    gaps = [after - before for before, after in itertools.pairwise(places)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def plot(
    target: Path,
    outcomes: Sequence[Outcome],
    metric: Metric,
    title: str,
    xlabel: str,
    values: Sequence[float] | None,
) -> None:
    """Every seed's value as a point, and each setting's mean with its standard deviation.

    Args:
        target: the PNG to write.
        outcomes: one for each place on the x axis.
        metric: what they are of.
        title, xlabel: texts.
        values: where each outcome is, joined by a line; None writes their names side by side. The axis is logarithmic
            where they are spaced so, see `are_spaced_by_factors`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.9 * len(outcomes) + 2), 4.5), layout="constrained")  # no pyplot: no display
    axes = figure.subplots()
    places = [float(i) for i in range(len(outcomes))] if values is None else values
    for x, outcome in zip(places, outcomes, strict=True):
        label = "one seed" if outcome is outcomes[0] else None
        axes.plot([x] * len(outcome.values), outcome.values, label=label, **_POINTS)
    spread = [0.0 if math.isnan(outcome.std) else outcome.std for outcome in outcomes]
    line = "none" if values is None else "-"
    means = [outcome.mean for outcome in outcomes]
    axes.errorbar(places, means, spread, label="mean ± standard deviation", linestyle=line, **_MEANS)
    if values is None:
        axes.set_xticks(places, [outcome.name for outcome in outcomes], rotation=30 if len(outcomes) > 8 else 0)
        axes.set_xlim(-0.5, len(outcomes) - 0.5)
    elif are_spaced_by_factors(values):
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:g}" for place in places], rotation=30 if len(places) > 8 else 0)
        axes.set_xticks([], minor=True)  # else ticks between the values are written over theirs
    axes.set_title(title, parse_math=False)
    axes.set(xlabel=xlabel, ylabel=metric.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=110)
