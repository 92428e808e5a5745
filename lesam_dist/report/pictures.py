"""Charts as SVG, by matplotlib: what is printed, and shown where scripts do not run."""

from __future__ import annotations

import base64
import io
import math
import warnings
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.commands.labels import reals
from lesam_dist.report.blocks import Chart, Line, Plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.5, 1.5))}
_INK, _GRID, _LEVELS = "#2b2b2b", "#d9d9d9", 24
_WIDEST = 50  # letters in a row of a legend
_DARK = {_INK: "#d6d6d6", _GRID: "#3d4147"}
# Text as text, which is small and can be searched; the same bytes for the same chart.
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lesam",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(chart: Chart | Plane) -> str:
    """The picture, with colours of its own where the reader prefers a dark page."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = _STYLE  # whose keys mypy wants as literals
    with matplotlib.rc_context(rc=style), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # measured with a box; the reader's font has it
        figure = Figure(figsize=(5.0, 3.2 + 0.2 * max(0, _legend_rows(chart) - 1)), layout="constrained")
        if isinstance(chart, Chart):
            _curves(figure, chart)
        else:
            _plane(figure, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _with_dark(file.getvalue())


def data_uri(picture: str) -> str:
    """An SVG as an address of itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode()


def _curves(figure: Figure, chart: Chart) -> None:
    axes = figure.subplots()
    for line in chart.lines:
        _line(axes, line)
    axes.set_xlabel(chart.x, parse_math=False)
    axes.set_ylabel(chart.y, parse_math=False)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    for axis, ticks in ((axes.xaxis, chart.x_ticks), (axes.yaxis, chart.y_ticks)):
        if ticks:
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_ticks([], minor=True)
    if chart.integer_x:
        axes.locator_params("x", integer=True)
    axes.grid(linewidth=0.7)
    _legend(figure, axes, chart)


def _line(axes: Axes, line: Line) -> None:
    y = reals(line.y)
    marker = "o" if line.marks else None
    axes.plot(line.x, y, color=line.style.colour, linestyle=_DASHES[line.style.dash], marker=marker, markersize=3)
    if line.low is not None and line.high is not None:
        low, high = reals(line.low), reals(line.high)
        axes.fill_between(line.x, low, high, color=line.style.colour, alpha=0.18, linewidth=0)


def _legend(figure: Figure, axes: Axes, chart: Chart) -> None:
    """Above the axes; the names are set afterwards, as matplotlib leaves out those that begin with "_"."""
    if len(chart.lines) < 2:
        return
    handles = axes.get_lines()
    columns = -(-len(handles) // _legend_rows(chart))
    how: dict[str, Any] = {
        "loc": "outside upper left",
        "frameon": False,
        "fontsize": "small",
        "ncols": columns,
        "handlelength": 2.8,
    }
    # As wide as the names will be, without a "_" in front.
    legend = figure.legend(handles, [f"\N{FIGURE SPACE}{line.name}" for line in chart.lines], **how)
    for text, line in zip(legend.get_texts(), chart.lines, strict=True):
        text.set_parse_math(False)
        text.set_text(line.name)


def _legend_rows(chart: Chart | Plane) -> int:
    """As many columns as there is room for."""
    if isinstance(chart, Plane) or len(chart.lines) < 2:
        return 0
    columns = max(1, min(3, _WIDEST // max(len(line.name) for line in chart.lines)))
    return -(-len(chart.lines) // columns)


def _plane(figure: Figure, plane: Plane) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    axes = figure.subplots()
    values = np.ma.masked_invalid(np.array([reals(row) for row in plane.values]))
    norm = LogNorm(plane.low, plane.high) if plane.log else Normalize(plane.low, plane.high)
    levels = (np.geomspace if plane.log else np.linspace)(plane.low, plane.high, _LEVELS)
    drawn = axes.contourf(plane.places, plane.places, values, levels, norm=norm, cmap="viridis")
    axes.plot(0, 0, marker="+", color="red", markersize=9)
    axes.set(aspect="equal", xlabel="first direction", ylabel="second direction")
    bar = figure.colorbar(drawn, ax=axes, label="loss", format="%.3g")
    bar.set_ticks(levels[:: math.ceil(_LEVELS / 6)].tolist())


def _with_dark(picture: str) -> str:
    """Rules for a dark page: a program that does not know them shows the light colours."""
    rules = "".join(
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media screen and (prefers-color-scheme: dark) {{ {rules} }}</style>"
    start = picture.index(">", picture.index("<svg")) + 1
    return picture[:start] + style + picture[start:]
