"""Charts as plotly.js takes them: JSON of traces and axes, whose colours of text and grid are the page's."""

from __future__ import annotations

import base64
import gzip
import html
import math
from functools import cache
from typing import Any

from lesam_dist.report.blocks import Chart, Line, Plane, Values

_TICKS = 6


@cache
def script() -> str:
    """plotly.js of the installed package, compressed for the page to unpack: 2 MB instead of 5."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def figure(chart: Chart | Plane) -> dict[str, Any]:
    """``data`` and ``layout`` for `Plotly.newPlot`; numbers that are not finite are None."""
    return _curves(chart) if isinstance(chart, Chart) else _plane(chart)


def _curves(chart: Chart) -> dict[str, Any]:
    traces = [trace for line in chart.lines for trace in _line(line)]
    several = len(chart.lines) > 1
    x, y = _axis(chart.x, log=chart.log_x), _axis(chart.y, log=chart.log_y)
    places = [place for line in chart.lines for place in line.x]
    if chart.integer_x and max(places) - min(places) < _TICKS:
        x |= {"dtick": 1}
    for axis, ticks in ((x, chart.x_ticks), (y, chart.y_ticks)):
        if ticks:
            axis |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"data": traces, "layout": {"xaxis": x, "yaxis": y, "showlegend": several, "hovermode": "x unified"}}


def _axis(title: str, *, log: bool) -> dict[str, Any]:
    return {"title": {"text": html.escape(title)}, "type": "log" if log else "linear"}


def _line(line: Line) -> list[dict[str, Any]]:
    """The band first, to lie below; a click on the name hides both."""
    colour = line.style.colour
    name = html.escape(line.name)  # plotly.js reads a little HTML in texts
    common = {"legendgroup": name, "x": [float(x) for x in line.x], "type": "scatter"}
    curve = {
        **common,
        "name": name,
        "y": _known(line.y),
        "mode": "lines+markers" if line.marks else "lines",
        "line": {"color": colour, "dash": line.style.dash, "width": 2},
        "marker": {"color": colour, "size": 5},
        "hovertemplate": "%{y:.4g} %{text}" if line.about else "%{y:.4g}",
        **({"text": list(line.about)} if line.about else {}),
    }
    if line.low is None or line.high is None:
        return [curve]
    # Between the band's edges there is no gap: it is drawn over the points that have both.
    pairs = zip(line.x, _known(line.low), _known(line.high), strict=True)
    points = [(x, a, b) for x, a, b in pairs if a is not None and b is not None]
    edge = {"showlegend": False, "hoverinfo": "skip", "mode": "lines", "line": {"width": 0, "color": colour}}
    lower = {**common, **edge, "x": [x for x, _, _ in points], "y": [a for _, a, _ in points]}
    upper = {**common, **edge, "x": [x for x, _, _ in points], "y": [b for _, _, b in points]}
    return [lower, {**upper, "fill": "tonexty", "fillcolor": f"{colour}2e"}, curve]


def _plane(plane: Plane) -> dict[str, Any]:
    rows = [_known(row) for row in plane.values]
    z = [[_place(value, plane) for value in row] for row in rows]
    low, high = (_place(value, plane) or 0.0 for value in (plane.low, plane.high))
    ticks = [low + (high - low) * i / (_TICKS - 1) for i in range(_TICKS)]
    surface = {
        "type": "contour",
        "x": [float(x) for x in plane.places],
        "y": [float(y) for y in plane.places],
        "z": z,
        "customdata": rows,
        "zmin": low,
        "zmax": high,
        "contours": {"start": low, "end": high, "size": (high - low) / 24},
        "line": {"width": 0.3},
        "colorscale": "Viridis",
        "colorbar": {
            "title": {"text": "loss"},
            "tickvals": ticks,
            "ticktext": [f"{10**tick if plane.log else tick:.3g}" for tick in ticks],
            "thickness": 14,
        },
        "hovertemplate": "loss %{customdata:.4g}<br>at %{x:.3g}, %{y:.3g}<extra></extra>",
    }
    centre = {
        "type": "scatter",
        "x": [0],
        "y": [0],
        "mode": "markers",
        "marker": {"symbol": "cross-thin", "size": 11, "line": {"color": "#ff2222", "width": 2}},
        "hoverinfo": "skip",
    }
    axes = {
        "xaxis": {"title": {"text": "first direction"}, "constrain": "domain"},
        "yaxis": {"title": {"text": "second direction"}, "scaleanchor": "x", "constrain": "domain"},
    }
    return {"data": [surface, centre], "layout": {**axes, "showlegend": False, "hovermode": "closest"}}


def _place(value: float | None, plane: Plane) -> float | None:
    """On the scale of colours."""
    return math.log10(value) if value is not None and plane.log else value


def _known(values: Values) -> list[float | None]:
    return [value if value is not None and math.isfinite(value) else None for value in values]
