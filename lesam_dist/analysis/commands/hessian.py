"""`lesam-dist analyze hessian`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lesam_dist.analysis.command import Analysis, Work
from lesam_dist.analysis.commands.labels import plus_minus, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lesam_dist.analysis.engine.output import Document
    from lesam_dist.analysis.engine.subject import Subject

_OWN = ("top", "trace_vectors", "density_vectors", "lanczos_steps", "tolerance")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--top", type=int, default=5, help="largest eigenvalues to find; the paper has 50 (default: 5)")
    add("--trace_vectors", type=int, default=30, help="random vectors for the trace (default: 30)")
    add("--density_vectors", type=int, default=2, help="random vectors for the spectral density (default: 2)")
    add("--lanczos_steps", type=int, default=40, help="products for each of these (default: 40)")
    add("--tolerance", type=float, default=1e-3, help="relative error of the eigenvalues (default: 1e-3)")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from lesam_dist.analysis.measures.hessian import check

    own = {name: getattr(arguments, name) for name in _OWN}
    check(None, **own)
    return own


def _passes(arguments: argparse.Namespace, subject: Subject) -> tuple[int, int, str]:
    from lesam_dist.analysis.measures.hessian import check, expected_products

    own = {name: getattr(arguments, name) for name in _OWN}
    check(sum(p.numel() for p in subject.model.parameters()), **own)
    products = expected_products(*[own[name] for name in _OWN[:-1]])
    return products, 2 * products, f"{products} products with the Hessian, and the gradient"


def _compute(arguments: argparse.Namespace, subject: Subject, work: Work) -> dict[str, Any]:
    from lesam_dist.analysis.measures.hessian import hessian

    objective = subject.objective()
    own = {name: getattr(arguments, name) for name in _OWN}
    found = hessian(
        objective, **own, seed=arguments.seed, journal=work.journal, on_product=lambda made: work.advance(3 * made)
    )
    loss, gradient = objective.gradient()
    return found.numbers() | {
        "loss": loss,
        "grad_norm": float(gradient.norm()),
        "weights": objective.size,
        "passes": objective.passes,
    }


def _draw(document: Document) -> Figure:
    from matplotlib.figure import Figure

    from lesam_dist.analysis.engine.lanczos import Quadrature
    from lesam_dist.analysis.measures.hessian import smoothed

    results = document["results"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = results["eigenvalues"]
    left.bar(range(1, len(values) + 1), values, color="tab:blue")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(title="largest eigenvalues", xlabel="rank", ylabel="eigenvalue")
    if results["density"]:
        x, y = smoothed([Quadrature(**each) for each in results["density"]])
        right.semilogy(x, y, linewidth=1.2)
        right.set_ylim(1e-7 * max(y), 3 * max(y))
    right.set(title="spectral density", xlabel="eigenvalue", ylabel="density")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title(document), parse_math=False)
    return figure


def _rows(document: Document) -> list[tuple[str, str]]:
    results = document["results"]
    rows = [("largest eigenvalues", "  ".join(f"{value:.4g}" for value in results["eigenvalues"][:5]))]
    if results["first_over_fifth"] is not None:
        rows.append(("first over fifth", f"{results['first_over_fifth']:.3g}"))
    if trace := results["trace"]:
        rows.append(("trace", f"{trace['mean']:.4g}{plus_minus(trace)}"))
    if results["density"]:
        nodes = [node for each in results["density"] for node in each["nodes"]]
        rows.append(("spectrum seen", f"{min(nodes):.4g} to {max(nodes):.4g}"))
    rows.append(("loss, gradient norm", f"{results['loss']:.4g}, {results['grad_norm']:.4g}"))
    return rows


ANALYSIS = Analysis(
    "hessian",
    "Largest eigenvalues, trace and spectral density of the Hessian of the mean cross entropy at a checkpoint, from "
    "exact products with it (Figure 3a of the paper): in eval mode, on images without augmentation, in float32.",
    _add_arguments,
    _settings,
    _passes,
    _compute,
    _draw,
    _rows,
)
