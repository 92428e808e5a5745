"""`lesam-dist analyze landscape`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.command import Comparison, Work
from lesam_dist.analysis.commands.labels import labels, title

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lesam_dist.analysis.engine.objective import Objective
    from lesam_dist.analysis.engine.output import Document
    from lesam_dist.analysis.engine.subject import Subject
    from lesam_dist.parallel.processes import Distributed

_POINTS = {1: 51, 2: 21}  # Li et al. have 51; on a plane 441 passes show what 2,601 do
_LEVELS = 26
_STEEP = 30.0  # highest over lowest loss from which a logarithm shows more


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dims", type=int, choices=(1, 2), default=2, help="1: along a line; 2: over a plane (default: 2)")
    add(
        "--points",
        type=int,
        help="along each direction; an odd number has the checkpoint itself (default: 51 on a line, 21 on a plane, "
        "where the 51 of Li et al. take six times as long)",
    )
    add("--range", type=float, default=1.0, help="from -R to R, where 1 is the weights' own length (default: 1)")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from lesam_dist.analysis.measures.landscape import grid

    points = _POINTS[arguments.dims] if arguments.points is None else arguments.points
    grid(points, arguments.range)
    return {"dims": arguments.dims, "points": points, "range": arguments.range}


def _passes(arguments: argparse.Namespace, subjects: Sequence[Subject]) -> tuple[int, int, str]:
    own = _settings(arguments)
    each: int = own["points"] ** own["dims"]
    what = f"{each} points" + (f" for each of {len(subjects)} checkpoints" if len(subjects) > 1 else "")
    return (each + 1) * len(subjects), 0, what  # and the checkpoint itself, as an even grid does not have it


def _compute(arguments: argparse.Namespace, subjects: Sequence[Subject], work: Work) -> dict[str, Any]:
    from lesam_dist.analysis.measures.landscape import grid

    own = _settings(arguments)
    made = 0
    surfaces = []
    for i, subject in enumerate(subjects):
        objective = subject.objective()
        surfaces.append(_surface(i, objective, subject.world, own, arguments.seed, work))
        made += sum(subject.world.gather(objective.passes["forward"]))
    return {
        "coordinates": grid(own["points"], own["range"]),
        "normalisation": "filter",
        "seed": arguments.seed,
        "surfaces": surfaces,
        "passes": {"forward": made, "backward": 0},
    }


def _surface(
    i: int, objective: Objective, world: Distributed, own: dict[str, Any], seed: int, work: Work
) -> dict[str, Any]:
    """Of the i-th checkpoint."""
    from lesam_dist.analysis.measures.landscape import filter_normalised, grid, landscape

    before = i * (own["points"] ** own["dims"] + 1)
    found = landscape(
        objective,
        [filter_normalised(objective, seed, k) for k in range(own["dims"])],
        grid(own["points"], own["range"]),
        world=world,
        journal=work.journal,
        name=f"checkpoint {i} point",
        on_point=lambda known: work.advance(before + known),
    )
    loss = work.journal.get(f"checkpoint {i}", lambda: world.share(objective.loss() if world.is_main else None))
    return {"loss": loss, "losses": found.losses.tolist(), "nonfinite": found.nonfinite}


def _draw(document: Document) -> Figure:
    import numpy as np

    results = document["results"]
    surfaces = [np.array(each["losses"], dtype=np.float64) for each in results["surfaces"]]  # null is nan
    draw = _draw_lines if surfaces[0].ndim == 1 else _draw_planes
    figure = draw(results["coordinates"], surfaces, labels(document))
    figure.suptitle(title(document), parse_math=False)
    return figure


def _draw_lines(coordinates: list[float], curves: list[NDArray[np.float64]], names: list[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    for curve, name in zip(curves, names, strict=True):
        axes.plot(coordinates, curve, marker=".", label=name)
    low, high = _extent(curves)
    if 0 < _STEEP * low < high:
        axes.set_yscale("log")
    axes.set(xlabel="along a filter-normalised direction", ylabel="loss")
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend()
    return figure


def _draw_planes(coordinates: list[float], surfaces: list[NDArray[np.float64]], names: list[str]) -> Figure:
    """Panels on the same levels of colour; points without a finite loss stay grey."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    low, high = _extent(surfaces)
    steep = 0 < _STEEP * low < high
    norm = LogNorm(low, high) if steep else Normalize(low, high)
    levels = np.geomspace(low, high, _LEVELS) if steep else np.linspace(low, high, _LEVELS)
    columns = min(len(surfaces), 3)
    rows = math.ceil(len(surfaces) / columns)
    figure = Figure(figsize=(4.2 * columns + 1.2, 4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(surfaces) :]:
        axes.set_axis_off()
    used = list(panels.flat[: len(surfaces)])
    ticks = [coordinates[0], coordinates[0] / 2, 0, coordinates[-1] / 2, coordinates[-1]]
    for axes, surface, name in zip(used, surfaces, names, strict=True):
        values = np.ma.masked_invalid(surface.T)  # the first direction is the horizontal one
        drawn = axes.contourf(coordinates, coordinates, values, levels, norm=norm, cmap="viridis", extend="neither")
        axes.contour(coordinates, coordinates, values, levels, norm=norm, colors="white", linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, marker="+", color="red", markersize=9)
        axes.set_facecolor("lightgrey")
        axes.set(aspect="equal", xticks=ticks, yticks=ticks, xlabel="first direction")
        axes.tick_params(labelbottom=True)  # shared, but the panel below may be empty
        if len(surfaces) > 1:
            axes.set_title(name, parse_math=False)
    for row in panels:
        row[0].set_ylabel("second direction")
    bar = figure.colorbar(drawn, ax=used, label="loss", format="%.3g")
    bar.set_ticks(levels[::5].tolist())
    return figure


def _extent(surfaces: list[NDArray[np.float64]]) -> tuple[float, float]:
    """The lowest and the highest finite loss, apart from each other."""
    import numpy as np

    finite = np.concatenate([surface[np.isfinite(surface)] for surface in surfaces])
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, max(high, low + 1e-6 * max(abs(low), 1.0))


def _rows(document: Document) -> list[tuple[str, str]]:
    import numpy as np

    results = document["results"]
    rows = []
    for name, each in zip(labels(document), results["surfaces"], strict=True):
        of = f", {name}" if len(results["surfaces"]) > 1 else ""
        losses = np.array(each["losses"], dtype=np.float64)
        finite = losses[np.isfinite(losses)]
        loss = "not finite" if each["loss"] is None else f"{each['loss']:.4g}"
        rows.append((f"loss{of}", loss))
        if len(finite):
            rows.append((f"on the grid{of}", f"{finite.min():.4g} to {finite.max():.4g}, mean {finite.mean():.4g}"))
        if each["nonfinite"]:
            rows.append((f"points not finite{of}", f"{each['nonfinite']} of {losses.size}"))
    return rows


ANALYSIS = Comparison(
    "landscape",
    "The mean cross entropy on a line or a plane through the weights of a checkpoint, along random directions whose "
    "filters are as long as the weights' (Li et al. 2018): in eval mode with BatchNorm's own statistics, on images "
    "without augmentation, in float32. Several checkpoints of one model are shown along the same random numbers.",
    _add_arguments,
    _settings,
    _passes,
    _compute,
    _draw,
    _rows,
    whole=True,
    variant=lambda arguments: f"landscape-{arguments.dims}d",
)
