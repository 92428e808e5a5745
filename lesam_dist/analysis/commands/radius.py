"""`lesam-dist analyze radius`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.commands.labels import reals
from lesam_dist.config.parser import Parser, examples
from lesam_dist.parallel.place import find_place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT = (
    "What the perturbation's radius did in a run, and what the loss made of it, from its metrics.jsonl: mean of each "
    "epoch's logged steps, with minimum and maximum (Figure 5 and Eq. 15 of the paper). --logging.every_steps of the "
    "run says how many steps that are."
)
_PANELS = (
    ("radius", ("rho", "uncapped")),
    ("loss of a step's batch", ("loss", "perturbed_loss")),
    ("rise of the loss beyond ...", ("beyond_first_order", "over_budget")),
)
_LABELS = {
    "rho": "applied rho",
    "uncapped": "sigma / ||g||",
    "loss": "L(w)",
    "perturbed_loss": "L(w + eps)",
    "beyond_first_order": "rho ||g||",
    "over_budget": "sigma",
}


def command(argv: Sequence[str]) -> None:
    """Write RUN_DIR/analysis/radius.json, .png and .svg, in place of what an earlier call wrote."""
    parser = Parser("analyze radius", _TEXT, examples("analyze radius runs/digits"))
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help="folder for the results (default: RUN_DIR/analysis)")
    arguments = parser.parse_args(list(argv))
    if find_place(os.environ).rank:  # it reads a file, which several processes do no faster
        return

    import torch  # here: --help and what is refused need no torch

    from lesam_dist.analysis.engine.output import Output
    from lesam_dist.analysis.measures.radius import radius
    from lesam_dist.experiments.report import show
    from lesam_dist.parallel.processes import Distributed

    run: Path = arguments.run
    found = radius(run)
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    output = Output(
        arguments.output or run / "analysis", "radius", {"last_step": found["last_step"]}, alone, force=True
    )
    document = output.write(found, {"analysis": "radius", "run": run.resolve().name})
    output.draw(draw(document))
    show(("radius", "first epoch", "last epoch"), rows(found))
    print(f"results: {output.path('json')}  (.png, .svg)")


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, first and last epoch of what `radius` found."""
    from lesam_dist.analysis.measures.radius import QUANTITIES

    table = []
    for name, text in QUANTITIES.items():
        if name in found:
            spread = found[name]
            first, last = (
                f"{spread['mean'][i]:.4g} ({spread['min'][i]:.4g} to {spread['max'][i]:.4g})" for i in (0, -1)
            )
            table.append((text, first, last))
    if "capped" in found:
        first, last = (f"{100 * found['capped'][i]:.0f} %" for i in (0, -1))
        table.append(("logged steps that rho_max capped", first, last))
    return table


def draw(document: dict[str, Any]) -> Figure:
    """Three panels over the epochs, with a band from minimum to maximum."""
    from matplotlib.figure import Figure

    found = document["results"]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 3), _PANELS, strict=True):
        for name, style in zip(names, ("-", "--"), strict=True):  # they may lie on each other
            if name in found:
                _band(axes, found["epochs"], found[name], _LABELS[name], style)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
        if "beyond" in title:
            axes.axhline(0, color="gray", linewidth=0.8)
    figure.suptitle(document["run"], parse_math=False)
    return figure


def _band(axes: Axes, epochs: Sequence[int], spread: dict[str, list[float | None]], label: str, style: str) -> None:
    low, mean, high = (reals(spread[which]) for which in ("min", "mean", "max"))
    (line,) = axes.plot(epochs, mean, label=label, linestyle=style, marker="o", markersize=3 if len(epochs) < 50 else 0)
    axes.fill_between(epochs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
