"""What the radius did, and what the loss made of it: `lesam_dist.analysis.radius` of every run, over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lesam_dist.analysis.commands.labels import number
from lesam_dist.analysis.measures.radius import QUANTITIES, radius
from lesam_dist.errors import UserError
from lesam_dist.report.blocks import Chart, Line, Section, Style, Table, Text, Values
from lesam_dist.report.curves import is_steep, over_seeds
from lesam_dist.report.grouping import is_plain
from lesam_dist.report.reading import Run
from lesam_dist.report.results import Result

_CHARTS = (
    ("radius", "Radius", "radius", (("rho", ""), ("uncapped", "sigma / ||g||"))),
    ("step-losses", "Losses of a step's batch", "loss", (("loss", "L(w)"), ("perturbed_loss", "L(w + eps)"))),
    ("rise", "Rise of the loss", "L(w + eps) - L(w)", (("increase", ""),)),
    ("over-budget", "Rise beyond the budget", "L(w + eps) - L(w) - sigma", (("over_budget", ""),)),
    ("curvature", "Rise beyond the first order", "L(w + eps) - L(w) - rho ||g||", (("beyond_first_order", ""),)),
)
_NOTE = (
    "Mean of each epoch's logged steps. Band: ± one standard deviation over seeds; of one seed, from its smallest to "
    "its largest step."
)


def dynamics(results: Sequence[Result]) -> Section | None:
    """Charts over the epochs, and the last epoch's numbers; None where no run has a radius."""
    section = Section("radius", "Radius dynamics")
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if is_plain(result.group):
            continue
        each = [_radius(run) for run in result.group.runs]
        known = [one for one in each if not isinstance(one, str)]
        section.blocks.extend([Text(one) for one in each if isinstance(one, str)])
        if known:
            found[result.name] = known
    styles = {result.name: result.group.style for result in results}
    for key, title, unit, quantities in _CHARTS:
        lines = [
            _line(f"{name}, {text}" if text else name, styles[name], runs, quantity, second=i > 0)
            for name, runs in found.items()
            for i, (quantity, text) in enumerate(quantities)
            if all(quantity in run for run in runs)
        ]
        if lines:
            section.blocks.append(
                Chart(key, title, "epoch", unit, lines, log_y=key == "radius" and is_steep(lines), integer_x=True)
            )
    if found:
        section.blocks.append(Text(_NOTE, "note"))
        section.blocks.append(_table(found, styles))
    return section if section.blocks else None


def _radius(run: Run) -> dict[str, Any] | str:
    try:
        return radius(run.path)
    except (UserError, KeyError, TypeError) as error:
        return f"{run.name}: {error}"


def _line(name: str, style: Style, runs: Sequence[dict[str, Any]], quantity: str, *, second: bool) -> Line:
    points = [dict(zip(run["epochs"], _finite(run[quantity]["mean"]), strict=True)) for run in runs]
    if second:
        style = replace(style, dash="dash" if style.dash == "solid" else "dot")
    line = over_seeds(name, style, points, marks=max(map(len, points)) <= 40)
    if len(runs) > 1:
        return line
    low, high = _finite(runs[0][quantity]["min"]), _finite(runs[0][quantity]["max"])
    about = [f"{number(a)} to {number(b)}" for a, b in zip(low, high, strict=True)]
    return replace(line, low=low, high=high, about=about)


def _finite(values: Sequence[float]) -> Values:
    return [value if math.isfinite(value) else None for value in values]


def _table(found: dict[str, list[dict[str, Any]]], styles: dict[str, Style]) -> Table:
    """Of the last epoch, the mean over runs of the means of their logged steps."""
    names = [name for name in QUANTITIES if any(name in run for runs in found.values() for run in runs)]
    rows = []
    for group, runs in found.items():
        cells = [_mean([run[name]["mean"][-1] for run in runs if name in run]) for name in names]
        capped = [100 * run["capped"][-1] for run in runs if "capped" in run]
        rows.append([group, *cells, f"{sum(capped) / len(capped):.0f} %" if capped else "-"])
    header = ["last epoch", *(QUANTITIES[name] for name in names), "steps that rho_max capped"]
    return Table(
        header, rows, "Means over the logged steps of the last epoch, and over seeds.", [styles[n] for n in found]
    )


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return number(mean if math.isfinite(mean) else None)
