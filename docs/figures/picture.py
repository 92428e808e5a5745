"""Draws the figures of picture.md, from closed forms and a few seconds of additions: python docs/figures/picture.py

budget.svg: the loss along the gradient at two weights, for SAM and for LE-SAM. radius.svg: radius and rise as functions
of the gradient's norm. restore.svg: what is lost where a perturbation is added and subtracted again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
SAM, LESAM = "#d55e00", "#0072b2"  # told apart by colour-blind readers too
STYLE = {"font.size": 11, "svg.hashsalt": "lesam", "axes.spines.top": False, "axes.spines.right": False}

CURVATURE, RHO, SIGMA, RHO_MAX = 2.0, 0.25, 0.12, 0.5
STEEP, FLAT = 1.0, 0.3  # norms of the gradient


def rise(t: float, norm: float) -> float:
    """Of ``L(t) = norm t + CURVATURE t^2 / 2``, how far the loss rises by a step of length t along the gradient."""
    return norm * t + CURVATURE * t**2 / 2


def radius(norm: float, sigma: float = SIGMA, rho_max: float = RHO_MAX) -> float:
    """LE-SAM's (paper, Algorithm 1, lines 7 and 8)."""
    return min(sigma / norm, rho_max)


def draw_budget(figure: Figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    _slice(axes[0], lambda _: RHO, SAM, "SAM: steps of one length")
    _slice(axes[1], radius, LESAM, "LE-SAM: steps of one rise of the tangent")
    axes[1].axhline(SIGMA, color="black", linewidth=0.9, linestyle="--")
    axes[1].text(0.545, SIGMA + 0.008, "$\\sigma$", ha="right")
    axes[0].set(ylabel="rise of the loss")


def _slice(axes: Axes, length: Callable[[float], float], colour: str, title: str) -> None:
    t = np.linspace(0, 0.55, 200)
    for norm, name in ((STEEP, "steep"), (FLAT, "flat")):
        rho = length(norm)
        axes.plot(t, norm * t + CURVATURE * t**2 / 2, color="0.45")
        axes.plot([0, rho], [0, norm * rho], color=colour, linewidth=1.2)
        axes.plot([rho, rho], [norm * rho, rise(rho, norm)], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot([rho, rho], [0, norm * rho], color=colour, linewidth=0.9, linestyle=":")
        axes.plot(rho, rise(rho, norm), "o", color=colour)
        end = 0.37 if norm == STEEP else 0.53
        axes.text(end, rise(end, norm) - 0.05, name, color="0.3")
    axes.set(title=title, xlabel="length of the step along $g/\\Vert g\\Vert$", xlim=(0, 0.55), ylim=(0, 0.6))


def draw_radius(figure: Figure) -> None:
    norm = np.geomspace(0.02, 10, 400)
    left, right = figure.subplots(1, 2)
    lesam = np.array([radius(n) for n in norm])
    for axes, factor in ((left, 1), (right, norm)):
        axes.plot(norm, lesam * factor, color=LESAM, linewidth=2.2)
        axes.plot(norm, RHO * factor + 0 * norm, color=SAM, linewidth=2.2)
        axes.axvline(SIGMA / RHO_MAX, color="black", linewidth=0.9, linestyle=":")
        axes.set(xscale="log", xlabel="norm of the gradient, $\\Vert g\\Vert$")
    left.set(title="how far the weights move", ylabel="radius $\\rho$", ylim=(0, 0.6))
    right.set(title="how far the tangent rises", ylabel="$\\rho\\,\\Vert g\\Vert$", ylim=(0, 0.5))
    left.text(SIGMA / RHO_MAX * 1.06, 0.56, "$\\sigma/\\rho_{max}$")
    left.text(0.5, 0.42, f"LE-SAM, $\\sigma$ = {SIGMA:g},\n$\\rho_{{max}}$ = {RHO_MAX:g}", color=LESAM)
    left.text(2.2, RHO + 0.013, f"SAM, {RHO:g}", color=SAM)


def drift(dtype: torch.dtype, cycles: int = 1000, size: int = 20_000) -> list[float]:
    """How far weights are from where they were after each w + e, then - e, relative to their norm."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(size, generator=generator).to(dtype)
    start, lost = w.double(), []
    for _ in range(cycles):
        e = torch.randn(size, generator=generator)
        e = (3e-3 * start.norm() * e / e.norm()).to(dtype)
        w = w.add(e).sub(e)
        lost.append(float((w.double() - start).norm() / start.norm()))
    return lost


def draw_restore(figure: Figure) -> None:
    axes = figure.subplots()
    formats = (
        ("float32", torch.float32, "#0072b2"),
        ("float16", torch.float16, "#009e73"),
        ("bfloat16", torch.bfloat16, "#d55e00"),
    )
    for name, dtype, colour in formats:
        lost = drift(dtype)
        axes.plot(range(1, len(lost) + 1), lost, color=colour, linewidth=2)
        axes.text(len(lost) * 1.03, lost[-1], name, color=colour, va="center")
    axes.set(yscale="log", xlim=(0, 1150), ylim=(1e-9, 1e-1), xlabel="steps of $w + e$, then $- e$")
    axes.set(ylabel="distance from w, relative to w", title="a copy gives 0, always")


FIGURES = {"budget": (draw_budget, (9, 3.6)), "radius": (draw_radius, (9, 3.6)), "restore": (draw_restore, (6.5, 3.4))}


def draw(folder: Path) -> None:
    """All figures, each as NAME.svg."""
    for name, (fill, size) in FIGURES.items():
        with rc_context(STYLE):
            figure = Figure(figsize=size, layout="constrained")
            fill(figure)
            description = f"drawn by docs/figures/picture.py, torch {torch.__version__}"
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Description": description})


if __name__ == "__main__":
    draw(FOLDER)
