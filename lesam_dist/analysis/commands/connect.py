"""`lesam-dist analyze connect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.command import Comparison, Work
from lesam_dist.analysis.commands.labels import labels, number, reals, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lesam_dist.analysis.engine.output import Document
    from lesam_dist.analysis.engine.subject import Subject

_SHOWN = (("loss", "loss"), ("error", "error rate, %"))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--points", type=int, default=21, help="places on the line, its ends among them (default: 21)")
    add(
        "--batchnorm",
        choices=("estimate", "interpolate"),
        default="estimate",
        help="BatchNorm's statistics at each place: estimated from the images, or the average of the two "
        "checkpoints', with which a network in between looks worse than it is (default: estimate)",
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from lesam_dist.analysis.measures.connect import check

    own = {"points": arguments.points, "batchnorm": arguments.batchnorm}
    check(**own)
    return own


def _passes(arguments: argparse.Namespace, subjects: Sequence[Subject]) -> tuple[int, int, str]:
    estimated = arguments.batchnorm == "estimate" and bool(subjects[0].objective().batchnorms())
    forwards = 2 + arguments.points * (2 if estimated else 1)
    what = " with BatchNorm's statistics estimated at each" if estimated else ""
    return forwards, 0, f"{arguments.points} places{what}, and the two checkpoints"


def _compute(arguments: argparse.Namespace, subjects: Sequence[Subject], work: Work) -> dict[str, Any]:
    from lesam_dist.analysis.measures.connect import connect

    objective, world = subjects[0].objective(), subjects[0].world
    first, second = (subject.model.state_dict() for subject in subjects)
    forwards = _passes(arguments, subjects)[0]
    all_points = arguments.points + 2
    found = connect(
        objective,
        first,
        second,
        points=arguments.points,
        batchnorm=arguments.batchnorm,
        world=world,
        journal=work.journal,
        on_point=lambda known: work.advance(forwards * known // all_points),
    )
    made = sum(world.gather(objective.passes["forward"]))
    return found.numbers() | {"passes": {"forward": made, "backward": 0}}


def _draw(document: Document) -> Figure:
    from matplotlib.figure import Figure

    results = document["results"]
    places = results["places"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    first, second = labels(document)
    for axes, (name, text) in zip(figure.subplots(1, 2), _SHOWN, strict=True):
        curve = results[name]
        values = reals(curve["values"])
        axes.plot(places, values, marker=".", label="between")
        axes.plot([0, 1], [values[0], values[-1]], linestyle=":", color="grey", label="straight line")
        if results["batchnorm"] == "estimate":
            ends = reals(curve["ends"])
            axes.plot([0, 1], ends, linestyle="none", marker="D", color="tab:orange", label="own BatchNorm statistics")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], [f"0\n{first}", "0.25", "0.5", "0.75", f"1\n{second}"])
        axes.set(ylabel=text)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title(document), parse_math=False)
    return figure


def _rows(document: Document) -> list[tuple[str, str]]:
    results = document["results"]
    rows = []
    for name, text in _SHOWN:
        rows.append((f"barrier, {text}", _barrier(results[f"{name}_barrier"])))
        values = results[name]["values"]
        rows.append((f"{text} at the ends", f"{number(values[0])}, {number(values[-1])}"))
        if results["batchnorm"] == "estimate":
            rows.append((f"{text} with own statistics", ", ".join(map(number, results[name]["ends"]))))
    if results["nonfinite"]:
        rows.append(("places not finite", f"{results['nonfinite']} of {len(results['places'])}"))
    return rows


def _barrier(found: dict[str, float] | None) -> str:
    if found is None:
        return "unknown, as a loss is not finite"
    if found["height"] == 0:
        return "0, nowhere above the straight line"
    return f"{found['height']:.4g} at {found['place']:.3g}"


ANALYSIS = Comparison(
    "connect",
    "The mean cross entropy and the error rate on the straight line between the weights of two checkpoints of one "
    "model, and how far they rise above the line between the ends' (linear mode connectivity): in eval mode, on images "
    "without augmentation, in float32.",
    _add_arguments,
    _settings,
    _passes,
    _compute,
    _draw,
    _rows,
    least=2,
    most=2,
    whole=True,
)
