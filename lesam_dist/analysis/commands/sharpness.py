"""`lesam-dist analyze sharpness`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.command import Analysis, Work
from lesam_dist.analysis.commands.labels import plus_minus, title
from lesam_dist.analysis.measures.sharpness_plan import PARTS, SharpnessPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lesam_dist.analysis.engine.output import Document
    from lesam_dist.analysis.engine.subject import Subject

_HELP: dict[str, tuple[type, str]] = {
    "parts": (str, "what to measure: " + "; ".join(f"{name}: {text}" for name, text in PARTS.items())),
    "batch_size": (int, "images of a batch"),
    "rho": (float, "radii of SAM's step and of Auto-PGD's l2 ball"),
    "adaptive_rho": (float, "radii of ASAM's step and of the ellipsoid ||d / |w| ||_2 <= rho"),
    "linf_rho": (float, "of the box |d_i| <= rho"),
    "adaptive_linf_rho": (float, "of the box |d_i| <= rho |w_i|"),
    "std": (float, "standard deviations of noise on each weight"),
    "adaptive_std": (float, "the same as multiples of each weight"),
    "m_sizes": (int, "images of a batch, for m-sharpness"),
    "sigma": (float, "budgets of the loss, for the radius"),
    "steps": (int, "of Auto-PGD"),
    "draws": (int, "of noise, for each batch"),
    "directions": (int, "random ones to go along, for each batch"),
    "max_radius": (float, "to go along a ray"),
}
_DEFAULT = SharpnessPlan()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, (kind, text) in _HELP.items():
        default = getattr(_DEFAULT, name)
        several = isinstance(default, Sequence)
        shown = " ".join(map(str, default)) if several else default
        how: dict[str, Any] = {"nargs": "*" if several and name != "parts" else "+"} if several else {}
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {shown})", **how)


def _plan(arguments: argparse.Namespace) -> SharpnessPlan:
    given: dict[str, Any] = {}
    for field in fields(SharpnessPlan):
        value = getattr(arguments, field.name)
        given[field.name] = tuple(value) if isinstance(value, list) else value
    return SharpnessPlan(**given)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    plan = _plan(arguments)
    plan.check()
    return asdict(plan)


def _passes(arguments: argparse.Namespace, subject: Subject) -> tuple[int, int, str]:
    plan = _plan(arguments)
    plan.check(subject.samples)
    forwards, backwards = plan.passes()
    return forwards, backwards, ", ".join(part for part in PARTS if part in plan.parts)


def _compute(arguments: argparse.Namespace, subject: Subject, work: Work) -> dict[str, Any]:
    from lesam_dist.analysis.measures.sharpness import sharpness

    objective = subject.objective()
    found = sharpness(
        objective,
        _plan(arguments),
        seed=arguments.seed,
        at_once=subject.source.config.data.eval_batch_size,
        journal=work.journal,
        on_passes=work.advance,
    )
    return {
        "measures": [measure.numbers() for measure in found.measures],
        "left_out": found.left_out,
        "weights": objective.size,
        "passes": {kind: round(count) for kind, count in found.passes.items()},
    }


def _draw(document: Document) -> Figure:
    from matplotlib.figure import Figure

    measures = document["results"]["measures"]
    panels = [
        (heading, xlabel, ylabel, lines)
        for heading, xlabel, ylabel, make in PANELS
        if (lines := lines_of(measures, make))
    ]
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for index, (heading, xlabel, ylabel, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, points in lines.items():
            _line(axes, name, points)
        axes.set(title=heading, xlabel=xlabel, ylabel=ylabel, xscale="log")
        ticks = sorted({x for points in lines.values() for x, _, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=30 if len(ticks) > 4 else 0)
        axes.minorticks_off()
        axes.margins(y=0.35)  # room for the legend
        if all(y > 0 for points in lines.values() for _, y, _ in points):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", framealpha=0.5)
    figure.suptitle(title(document), parse_math=False)
    return figure


Point = tuple[float, float, float]  # x, mean, standard error


def lines_of(measures: list[Document], make: Callable[[Document], tuple[str, str] | None]) -> dict[str, list[Point]]:
    """Points by the name of their line, of the measures for which ``make`` gives a name and a key of x."""
    lines: dict[str, list[Point]] = {}
    for measure in measures:
        named = make(measure)
        if named is not None and measure["mean"] is not None:
            name, key = named
            lines.setdefault(name, []).append((measure[key], measure["mean"], measure["standard_error"] or 0.0))
    return lines


def _line(axes: Axes, name: str, points: list[Point]) -> None:
    x, y, error = zip(*sorted(points), strict=True)
    axes.errorbar(x, y, yerr=error, marker="o", markersize=3, capsize=3, label=name)


def _worst(measure: Document, norm: str, *, adaptive: bool) -> tuple[str, str] | None:
    if measure["part"] not in ("one_step", "auto_pgd") or measure["adaptive"] is not adaptive:
        return None
    if measure["part"] == "one_step":
        return ("one step of ASAM" if adaptive else "one step of SAM", "rho") if norm == "l2" else None
    return ("Auto-PGD", "rho") if measure["norm"] == norm else None


def _box(measure: Document) -> tuple[str, str] | None:
    if measure["part"] != "auto_pgd" or measure["norm"] != "linf":
        return None
    return ("in units of |w|" if measure["adaptive"] else "the same for all weights"), "rho"


def _average(measure: Document) -> tuple[str, str] | None:
    if measure["part"] != "average":
        return None
    return ("in units of |w|" if measure["adaptive"] else "the same for all weights"), "rho"


def _m(measure: Document) -> tuple[str, str] | None:
    return (rf"$\rho$ = {measure['rho']:g}", "m") if measure["part"] == "m_sharpness" else None


def _radius(measure: Document) -> tuple[str, str] | None:
    names = {
        "first_order": r"first order, $\sigma / \|g\|$",
        "gradient": "along g",
        "random": "along random directions",
    }
    return (names[measure["kind"]], "sigma") if measure["part"] == "radius" and measure["kind"] in names else None


_RADII = {"first_order": r"first order, $\sigma / \|g\|$", "gradient": "along g", "random": "along random directions"}
_RISE = "rise of the loss"
PANELS: list[tuple[str, str, str, Callable[[Document], tuple[str, str] | None]]] = [
    ("worst case, ball", r"$\rho$", _RISE, lambda m: _worst(m, "l2", adaptive=False)),
    ("worst case, ellipsoid", r"$\rho$, in units of |w|", _RISE, lambda m: _worst(m, "l2", adaptive=True)),
    ("worst case, box (Auto-PGD)", r"$\rho$", _RISE, _box),
    ("average under noise", "standard deviation of noise", _RISE, _average),
    ("one step of SAM, by size of batch", "m, images of a batch", _RISE, _m),
    ("radius of a loss budget", r"budget $\sigma$", "radius", _radius),
]


_KINDS = {"first_order": "first order", "rise": "rise at first order", "gradient": "along g"}


def _rows(document: Document) -> list[tuple[str, str]]:
    rows: dict[str, list[str]] = {}
    for measure in document["results"]["measures"]:
        key = next((key for key in ("rho", "sigma") if key in measure), None)
        at = f"{measure[key]:g}: " if key else ""
        rows.setdefault(_name(measure, key), []).append(at + _value(measure))
    return [(name, "   ".join(values)) for name, values in rows.items()]


def _name(measure: Document, key: str | None) -> str:
    words = [measure["part"].replace("_", " ")]
    words += [measure["norm"]] if "norm" in measure else []
    words += [_KINDS.get(measure["kind"], measure["kind"])] if "kind" in measure else []
    words += ["adaptive"] if measure.get("adaptive") else []
    words += [f"m {measure['m']}"] if "m" in measure else []
    return ", ".join(words) + (f", by {key}" if key else "")


def _value(measure: Document) -> str:
    missing = f" ({measure['missing']} missing)" if measure["missing"] else ""
    if measure["mean"] is None:
        return "none" + missing
    return f"{measure['mean']:.3g}{plus_minus(measure)}{missing}"


ANALYSIS = Analysis(
    "sharpness",
    "How much the loss rises near a checkpoint, batch by batch, with the standard error over the batches: by one step "
    "of SAM and ASAM, by Auto-PGD in balls, boxes and ellipsoids (Andriushchenko et al., 2023), on average under "
    "noise, for several sizes of batch; and the radius that a loss budget allows: LE-SAM's first-order rule, and where "
    "the loss has really risen so far.",
    _add_arguments,
    _settings,
    _passes,
    _compute,
    _draw,
    _rows,
)
