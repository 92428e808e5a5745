"""`lesam-dist analyze robustness`."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.command import Analysis, Work
from lesam_dist.analysis.commands.corruption import corruption_rows, heat_map
from lesam_dist.analysis.commands.labels import number, title
from lesam_dist.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lesam_dist.analysis.engine.output import Document
    from lesam_dist.analysis.engine.subject import Subject
    from lesam_dist.analysis.measures.corruption import Corruptions

_NORMS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    radii: dict[str, Any] = {"type": _eps, "nargs": "*", "metavar": "EPS"}
    add("--linf", default=[1 / 255], help="radii in l_inf, for pixels from 0 to 1, as 8/255 (default: 1/255)", **radii)
    add("--l2", default=[32 / 255], help="radii in l_2, for pixels from 0 to 1 (default: 32/255)", **radii)
    add("--steps", type=int, default=10, help="of PGD, eps/4 (l_inf) or eps/8 (l_2) long (default: 10)")
    add("--corruptions", nargs="+", metavar="KIND", default=[], help="common corruptions, as fog frost, or all")
    add("--severities", nargs="+", type=int, metavar="N", help="of the corruptions, from 1 to 5 (default: all)")
    add("--corruptions_root", type=Path, metavar="DIR", help="take them from the files of CIFAR-10-C or CIFAR-100-C")


def _eps(text: str) -> float:
    """A number, or one over another."""
    try:
        return float(Fraction(text))
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError from error


_eps.__name__ = "radius, as 8/255 or 0.03,"  # in argparse's message


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from lesam_dist.analysis.measures.robustness import check

    own = {"linf": arguments.linf, "l2": arguments.l2, "steps": arguments.steps}
    check(**own)
    if (asked := _corruptions(arguments)) is None:
        return own
    return own | {"corruptions": asked.kinds, "severities": asked.severities, "corrupted_images": asked.images}


def _corruptions(arguments: argparse.Namespace) -> Corruptions | None:
    from lesam_dist.analysis.measures.corruption import corruptions_of

    if arguments.severities and not arguments.corruptions and arguments.corruptions_root is None:
        raise UserError("--severities are of corruptions, and there are none: give --corruptions all, or some kinds.")
    return corruptions_of(arguments.corruptions, arguments.severities, arguments.corruptions_root)


def _passes(arguments: argparse.Namespace, subject: Subject) -> tuple[int, int, str]:
    from lesam_dist.analysis.measures.robustness import passes
    from lesam_dist.tasks.classification.pgd import Scale

    several = len(arguments.linf) + len(arguments.l2)
    asked = _corruptions(arguments)
    cells = len(asked.cells) if asked else 0
    forwards, backwards = passes(arguments.linf, arguments.l2, arguments.steps, cells)
    attacks = f"{several} attack{'s' * (several != 1)} of {arguments.steps} steps"
    if asked is None:
        return forwards, backwards, f"{attacks}, and the images as they are"
    data = subject.source.config.data
    asked.of(subject.objective(), Scale(data.mean, data.std), arguments.seed)  # refuses what does not fit the run
    return forwards, backwards, f"{attacks}, {cells} sets of corrupted images, and the images as they are"


def _compute(arguments: argparse.Namespace, subject: Subject, work: Work) -> dict[str, Any]:
    from lesam_dist.analysis.measures.robustness import robustness

    objective, data = subject.objective(), subject.source.config.data
    found = robustness(
        objective,
        mean=data.mean,
        std=data.std,
        linf=arguments.linf,
        l2=arguments.l2,
        steps=arguments.steps,
        corruptions=arguments.corruptions,
        severities=arguments.severities,
        corruptions_root=arguments.corruptions_root,
        seed=arguments.seed,
        journal=work.journal,
        on_passes=lambda made: work.advance(int(made)),
    )
    return found.numbers() | {"passes": objective.passes}


def _draw(document: Document) -> Figure:
    from matplotlib.figure import Figure

    results = document["results"]
    norms = [norm for norm in _NORMS if any(each["norm"] == norm for each in results["attacked"])]
    corrupted = results.get("corrupted")
    count = len(norms) + (1 if corrupted is None else 2)
    figure = Figure(figsize=(5 * count, 4 if corrupted is None else 5), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if corrupted is not None:
        heat_map(panels.pop(), corrupted)
    *panels, last = panels
    for axes, norm in zip(panels, norms, strict=True):
        points = [(0.0, results["clean"])]  # what an eps of 0 gives
        points += [(255 * each["eps"], each) for each in results["attacked"] if each["norm"] == norm]
        points.sort(key=lambda point: point[0])
        y, error = ([each[key] for _, each in points] for key in ("accuracy", "standard_error"))
        axes.errorbar([x for x, _ in points], y, yerr=error, marker="o", markersize=4, capsize=3)
        axes.set(title=f"PGD, {_NORMS[norm]}", xlabel=r"$\epsilon$, in 1/255", ylabel="accuracy (%)", ylim=(-3, 103))
    _reliability(last, results["calibration"])
    for axes in (*panels, last):
        axes.grid(alpha=0.3)
    figure.suptitle(title(document), parse_math=False)
    return figure


def _reliability(axes: Axes, calibration: Document) -> None:
    """Accuracy by confidence, over the share of images in each bin."""
    import numpy as np

    bins = calibration["bins"]
    total = sum(each["images"] for each in bins)
    inner = [each for each in bins if each["low"] < 1]
    exact = [each for each in bins if each["low"] >= 1]  # drawn beyond 1, beside the others
    left = [each["low"] for each in inner] + [1.0 for _ in exact]
    width = [each["high"] - each["low"] for each in inner] + [0.02 for _ in exact]
    share = [each["images"] / total for each in (*inner, *exact)]
    axes.bar(left, share, width, align="edge", color="tab:gray", alpha=0.35, label="share of images")
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    x, y = (np.array([each[key] for each in bins], dtype=float) for key in ("confidence", "accuracy"))
    axes.plot(x, y, color="tab:blue", marker="o", markersize=4, label="accuracy")
    axes.set(title=f"calibration: ECE {number(calibration['ece'])}", xlabel="confidence", ylabel="accuracy, share")
    axes.set(xlim=(0, 1.04), ylim=(0, 1.04))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize="small")  # no corner is always free


def _rows(document: Document) -> list[tuple[str, str]]:
    results = document["results"]
    rows = [("accuracy", _percent(results["clean"]))]
    rows += [
        (f"under PGD, {each['norm']}, eps {255 * each['eps']:.4g}/255", _percent(each)) for each in results["attacked"]
    ]
    calibration = results["calibration"]
    rows += [("NLL, ECE", f"{number(calibration['nll'])}, {number(calibration['ece'])}")]
    return rows + corruption_rows(results["corrupted"]) if "corrupted" in results else rows


def _percent(accuracy: Document) -> str:
    return f"{accuracy['accuracy']:.2f} ± {accuracy['standard_error']:.2f} %"


ANALYSIS = Analysis(
    "robustness",
    "Accuracy under attacks on the pixels by projected gradient descent, in l_inf and l_2, with the settings of the "
    "paper's Table 5; and how well the predictions are calibrated without an attack: negative log-likelihood and "
    "expected calibration error (15 bins). With --corruptions or --corruptions_root also the common corruptions of "
    "Hendrycks and Dietterich, at five severities. On validation images, unless --split says otherwise. What is random "
    "about an image is the same for all checkpoints and methods.",
    _add_arguments,
    _settings,
    _passes,
    _compute,
    _draw,
    _rows,
    split="val",
)
