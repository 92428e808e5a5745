"""`lesam-dist analyze lpf`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.command import Analysis, Work
from lesam_dist.analysis.commands.labels import plus_minus, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lesam_dist.analysis.engine.output import Document
    from lesam_dist.analysis.engine.subject import Subject


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sigma", type=float, default=0.01, help="standard deviation of the noise on each weight (default: 0.01)")
    add("--draws", type=int, default=100, help="of the noise (default: 100)")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from lesam_dist.analysis.measures.lpf import check

    check(arguments.sigma, arguments.draws)
    return {"sigma": arguments.sigma, "draws": arguments.draws}


def _passes(arguments: argparse.Namespace, subject: Subject) -> tuple[int, int, str]:
    return arguments.draws + 1, 0, f"{arguments.draws} draws, and the loss without noise"


def _compute(arguments: argparse.Namespace, subject: Subject, work: Work) -> dict[str, Any]:
    from lesam_dist.analysis.measures.lpf import lpf

    objective = subject.objective()
    found = lpf(
        objective,
        sigma=arguments.sigma,
        draws=arguments.draws,
        seed=arguments.seed,
        journal=work.journal,
        on_draw=lambda made: work.advance(made + 1),
    )
    return found.numbers() | {"weights": objective.size, "passes": objective.passes}


def _draw(document: Document) -> Figure:
    import numpy as np
    from matplotlib.figure import Figure

    results = document["results"]
    losses = np.array(results["losses"], dtype=float)  # what is not finite is null, and becomes nan
    draws = np.arange(1, len(losses) + 1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(losses[np.isfinite(losses)], bins="auto", color="tab:blue", alpha=0.8)
    left.set(title=rf"loss under noise of $\sigma$ = {results['sigma']:g}", xlabel="loss", ylabel="draws")
    mean = np.cumsum(losses) / draws
    right.plot(draws, mean, color="tab:blue", marker="." if len(draws) == 1 else None, label="mean of the draws so far")
    if len(losses) > 1:
        spread = np.cumsum(losses**2) / draws - mean**2
        error = np.sqrt(np.maximum(spread, 0) / np.maximum(draws - 1, 1))
        right.fill_between(
            draws[1:], (mean - error)[1:], (mean + error)[1:], color="tab:blue", alpha=0.2, label="± standard error"
        )
    right.set(title="low-pass filtered loss", xlabel="draws", ylabel="loss")
    for mark in (left.axvline, right.axhline):
        mark(results["loss"], color="black", linestyle="--", label="loss without noise")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title(document), parse_math=False)
    return figure


def _rows(document: Document) -> list[tuple[str, str]]:
    results = document["results"]
    estimate = results["lpf"]
    if estimate["mean"] is None:
        return [("low-pass filtered loss", "not finite")]
    error = plus_minus(estimate)
    return [
        ("low-pass filtered loss", f"{estimate['mean']:.6g}{error}"),
        ("loss", f"{results['loss']:.6g}"),
        ("difference", f"{results['difference']:.4g}{error}"),
    ]


ANALYSIS = Analysis(
    "lpf",
    "The low-pass filtered loss of Bisla et al. (2022) at a checkpoint: the mean of the loss under Gaussian noise on "
    "all trainable weights, with its standard error, and the loss itself beside it (Figure 3b of the paper). The noise "
    "is the same for all checkpoints and methods.",
    _add_arguments,
    _settings,
    _passes,
    _compute,
    _draw,
    _rows,
)
