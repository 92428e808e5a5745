"""A plan for people: tables on the terminal, numbers as JSON, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lesam_dist.errors import UserError
from lesam_dist.planning.predict import Prediction

PARTS = {
    "compute": "passes",
    "exposed": "gradient reduction, not hidden",
    "scalars": "scalar all-reduces",
    "optimizer": "optimizer",
    "waiting": "waiting for images",
}
"""What a step is made of: attributes of `Prediction`, in words."""
_COLORS = ("tab:blue", "tab:red", "tab:purple", "tab:green", "tab:orange")
_GIB = 2**30

Predictions = Mapping[int, Prediction | None]
"""By number of GPUs; None where there are more than images in a batch."""


def step_table(found: Predictions, alone: float) -> tuple[list[str], list[list[str]]]:
    """A row for each number of GPUs. ``alone``: images per second of a GPU without others."""
    header = ["GPUs", "batch", "step ms", "compute", "reduction", "exposed", "scalars", "optimizer", "input"]
    header += ["images/s/GPU", "efficiency", "GiB/GPU", "epoch", "run", "price"]
    rows = []
    for count, p in found.items():
        if p is None:
            rows.append([str(count), *["-"] * (len(header) - 1)])
            continue
        parts = (p.step, p.compute, p.communication, p.exposed, p.scalars, p.optimizer, p.waiting)
        rate = p.images_per_second
        shown = [duration(p.epoch), duration(p.run), "-" if p.price is None else f"{p.price:,.0f}"]
        size = f"{p.total_memory / _GIB:.1f}"
        rows.append(
            [str(count), str(p.batch), *map(_ms, parts), f"{rate:,.0f}", f"{100 * rate / alone:.0f} %", size, *shown]
        )
    return header, rows


def change_table(
    base: Predictions, changed: Mapping[str, Predictions], memory: float
) -> tuple[list[str], list[list[str]]]:
    """What each alternative changes of a run's time and of a GPU's memory, of which it has so many bytes."""
    header = ["instead", *(f"{count} GPUs: run, memory" for count in base)]
    rows = [
        [name, *(_change(base[count], found[count], memory) for count in base)]
        for name, found in changed.items()
        if any(found.values())
    ]
    return header, rows


def _change(before: Prediction | None, after: Prediction | None, memory: float) -> str:
    if after is None:
        return "-"
    if after.total_memory > memory:
        return f"does not fit ({after.total_memory / _GIB:.0f} GiB)"
    if before is None:
        return f"{duration(after.run)}, {after.total_memory / _GIB:.1f} GiB"
    more = (after.total_memory - before.total_memory) / _GIB
    return f"{100 * (after.run / before.run - 1):+.0f} %, {more:+.1f} GiB"


def duration(seconds: float) -> str:
    """Two units at most: "3 d 4 h", "12 h 5 min", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def as_numbers(p: Prediction | None) -> dict[str, Any] | None:
    """A prediction for JSON."""
    if p is None:
        return None
    return {**asdict(p), "step": p.step, "images_per_second": p.images_per_second, "total_memory": p.total_memory}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Raises a UserError where the file cannot be written."""
    try:
        path.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json '{path}' cannot be written: {error.strerror or error}.") from error


def plot(path: Path, found: Predictions, alone: float, title: str) -> None:
    """What a step is made of, and how many images a second all GPUs take; raises a UserError as `write_json`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    shown = {count: p for count, p in found.items() if p is not None}
    figure = Figure(figsize=(10, 4.4), layout="constrained")  # no pyplot: no display
    left, right = figure.subplots(1, 2)
    names = [str(count) for count in shown]
    below = [0.0] * len(shown)
    for (part, label), color in zip(PARTS.items(), _COLORS, strict=True):
        heights = [100 * getattr(p, part) / p.step for p in shown.values()]
        if max(heights) < 0.05:
            continue
        left.bar(names, heights, bottom=below, label=label, color=color, width=0.65)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for name, p in zip(names, shown.values(), strict=True):
        left.annotate(f"{_ms(p.step)} ms", (name, 101), ha="center", va="bottom", fontsize=9)
    left.set(xlabel="GPUs", ylabel="share of a step (%)", ylim=(0, 112), title="What a step is made of")
    counts = list(shown)
    right.plot(counts, [alone * n for n in counts], color="grey", linestyle="--", label="each as fast as one alone")
    rates = [p.images_per_second * n for n, p in shown.items()]
    right.plot(counts, rates, marker="o", color="tab:blue", label="predicted")
    for n, rate in zip(counts, rates, strict=True):
        text = f"{100 * rate / (alone * n):.0f} %"
        right.annotate(text, (n, rate), textcoords="offset points", xytext=(6, -12), fontsize=9)
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s, all GPUs", title="Throughput")
    right.xaxis.set_major_locator(FixedLocator(counts))
    right.xaxis.set_major_formatter(FixedFormatter(names))
    right.xaxis.set_minor_locator(NullLocator())
    right.margins(x=0.12, y=0.12)
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(f"{title} (predicted, not measured)", fontsize=11)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot '{path}' cannot be written: {error}.") from error
