"""The charts of each analysis, of several checkpoints in one where they have the same axes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lesam_dist.report.blocks import Chart, Line, Plane, Style, sentence
from lesam_dist.report.curves import is_steep

if TYPE_CHECKING:
    from lesam_dist.report.analyses import Entry

_POINTS = 500  # of a density: as many as a screen shows
_FLOOR = 1e-7  # of its highest value, below which a density is not shown
_NORMS = {"linf": "l_inf", "l2": "l_2"}


def _hessian(entries: Sequence[Entry]) -> list[Chart | Plane]:
    from lesam_dist.analysis.engine.lanczos import Quadrature
    from lesam_dist.analysis.measures.hessian import smoothed

    values, densities = [], []
    for entry in entries:
        found = entry.document["results"]
        ranks = list(range(1, len(found["eigenvalues"]) + 1))
        values.append(Line(entry.name, ranks, found["eigenvalues"], entry.style, marks=True))
        if found["density"]:
            x, y = smoothed([Quadrature(**each) for each in found["density"]], _POINTS)
            shown = [value if value > _FLOOR * max(y) else None for value in y]
            densities.append(Line(entry.name, x, shown, entry.style))
    charts: list[Chart | Plane] = [
        Chart(
            "eigenvalues", "Largest eigenvalues", "rank", "eigenvalue", values, integer_x=True, log_y=is_steep(values)
        )
    ]
    if densities:
        note = "Stochastic Lanczos quadrature, each node a Gaussian of a hundredth of the range."
        charts.append(Chart("density", "Spectral density", "eigenvalue", "density", densities, note, log_y=True))
    return charts


def _sharpness(entries: Sequence[Entry]) -> list[Chart | Plane]:
    from lesam_dist.analysis.commands.sharpness import PANELS, lines_of

    charts: list[Chart | Plane] = []
    for i, (title, x, y, make) in enumerate(PANELS):
        lines = []
        for entry in entries:
            for j, (name, points) in enumerate(lines_of(entry.document["results"]["measures"], make).items()):
                style = entry.style if j == 0 else Style(entry.style.colour, ("dash", "dot")[(j - 1) % 2])
                lines.append(_with_errors(f"{entry.name}: {_plain(name)}", style, sorted(points)))
        if lines:
            charts.append(Chart(f"sharpness-{i}", sentence(title), _plain(x), y, lines, log_x=True))
    return charts


def _lpf(entries: Sequence[Entry]) -> list[Chart | Plane]:
    lines = []
    for entry in entries:
        found = entry.document["results"]
        mean, error = found["lpf"]["mean"], found["lpf"]["standard_error"]
        points = [(0.0, found["loss"], 0.0), (found["sigma"], mean, error or 0.0)]
        lines.append(_with_errors(entry.name, entry.style, [point for point in points if point[1] is not None]))
    x = "deviation of the noise on each weight"
    return [Chart("lpf", "Loss without noise, and its mean under noise", x, "loss", lines)]


def _landscape(entries: Sequence[Entry]) -> list[Chart | Plane]:
    charts: list[Chart | Plane] = []
    planes: list[tuple[str, list[float], list[list[float | None]]]] = []
    for i, entry in enumerate(entries):
        results = entry.document["results"]
        places, surfaces = results["coordinates"], [each["losses"] for each in results["surfaces"]]
        if isinstance(surfaces[0][0], list):  # by first direction, then by the second
            planes += [
                (name, places, [list(row) for row in zip(*losses, strict=True)])
                for name, losses in zip(entry.names, surfaces, strict=True)
            ]
            continue
        lines = [
            Line(name, places, losses, style)
            for name, losses, style in zip(entry.names, surfaces, entry.styles, strict=True)
        ]
        x = "along the direction; 1 is the weights' length"
        charts.append(Chart(f"landscape-{i}", "Loss on a line", x, "loss", lines, log_y=is_steep(lines)))
    known = [value for _, _, rows in planes for row in rows for value in row if value is not None]
    if known:
        low, high = min(known), max(max(known), min(known) + 1e-9)
        log = 0 < 30 * low < high
        charts += [
            Plane(f"plane-{i}", name, places, rows, low, high, log) for i, (name, places, rows) in enumerate(planes)
        ]
    return charts


def _connect(entries: Sequence[Entry]) -> list[Chart | Plane]:
    charts: list[Chart | Plane] = []
    for name, text in (("loss", "loss"), ("error", "error rate, %")):
        lines = [
            Line(
                entry.name,
                entry.document["results"]["places"],
                entry.document["results"][name]["values"],
                entry.style,
                marks=True,
            )
            for entry in entries
        ]
        x = "place: 0 is the first, 1 the second"
        charts.append(Chart(f"connect-{name}", f"{sentence(text.partition(',')[0])} in between", x, text, lines))
    return charts


def _robustness(entries: Sequence[Entry]) -> list[Chart | Plane]:
    charts: list[Chart | Plane] = []
    for norm, text in _NORMS.items():
        lines = []
        for entry in entries:
            found = entry.document["results"]
            attacked = [each for each in found["attacked"] if each["norm"] == norm]
            points = [(0.0, found["clean"]), *((255 * each["eps"], each) for each in attacked)]
            if attacked:
                numbers = [(x, each["accuracy"], each["standard_error"]) for x, each in points]
                lines.append(_with_errors(entry.name, entry.style, sorted(numbers)))
        if lines:
            title = f"Accuracy under PGD in {text}"
            charts.append(Chart(f"attacked-{norm}", title, "radius, in 1/255", "accuracy, %", lines))
    results = [(entry, entry.document["results"].get("corrupted")) for entry in entries]
    lines = [_by_severity(entry, found["cells"]) for entry, found in results if found]
    if lines:
        note = "Mean over the kinds of corruption."
        charts.append(
            Chart("corrupted", "Errors under corruptions", "severity", "error, %", lines, note, integer_x=True)
        )
    return charts


def _by_severity(entry: Entry, cells: Sequence[Mapping[str, Any]]) -> Line:
    errors: defaultdict[int, list[float]] = defaultdict(list)
    for cell in cells:
        errors[cell["severity"]].append(cell["error"])
    severities = sorted(errors)
    return Line(entry.name, severities, [fmean(errors[each]) for each in severities], entry.style, marks=True)


def _with_errors(name: str, style: Style, points: Sequence[tuple[float, float, float]]) -> Line:
    x, y, error = ([point[i] for point in points] for i in range(3))
    low, high = ([a + sign * b for a, b in zip(y, error, strict=True)] for sign in (-1, 1))
    about = [f"± {each:.2g}" if each else "" for each in error]
    return Line(name, x, y, style, low, high, about, marks=True)


def _plain(text: str) -> str:
    """Without mathtext, which is matplotlib's."""
    for code, plain in ((r"\rho", "ρ"), (r"\sigma", "σ"), (r"\|", "||"), (r"\epsilon", "ε"), ("$", "")):  # noqa: RUF001
        text = text.replace(code, plain)
    return text


CHARTS: dict[str, Callable[[Sequence[Entry]], list[Chart | Plane]]] = {
    "hessian": _hessian,
    "sharpness": _sharpness,
    "lpf": _lpf,
    "landscape": _landscape,
    "connect": _connect,
    "robustness": _robustness,
}
"""Of an analysis's entries; raises KeyError, TypeError, ... for a document that is not of this version."""
