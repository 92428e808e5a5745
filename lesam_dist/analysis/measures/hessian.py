"""The Hessian of the loss at a checkpoint: largest eigenvalues, trace, spectral density (Figure 3a of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.lanczos import Product, Quadrature, largest_eigenvalues, quadrature
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.randomness import normal, signs
from lesam_dist.analysis.engine.solving import solve
from lesam_dist.analysis.engine.statistics import Estimate, mean_with_error
from lesam_dist.errors import UserError


@dataclass(frozen=True)
class Hessian:
    """What `hessian` has found.

    Attributes:
        eigenvalues: the largest, largest first.
        trace: its estimate; None where no vectors were asked for.
        density: what each random vector saw of the spectral density.
        products: with the Hessian that were made, where this process made them.
    """

    eigenvalues: list[float]
    trace: Estimate | None
    density: list[Quadrature]
    products: int

    @property
    def first_over_fifth(self) -> float | None:
        """lambda_1 / lambda_5, how far the sharpest direction stands out; None for fewer."""
        return self.eigenvalues[0] / self.eigenvalues[4] if len(self.eigenvalues) > 4 else None

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"first_over_fifth": self.first_over_fifth}


def hessian(
    objective: Objective,
    *,
    top: int = 5,
    trace_vectors: int = 30,
    density_vectors: int = 2,
    lanczos_steps: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
    journal: Journal | None = None,
    on_product: Callable[[int], None] | None = None,
) -> Hessian:
    """Spectrum of ``H = d^2 L / dw^2`` at the weights that the model has.

    Eigenvalues are those of scipy's ARPACK. The trace is Hutchinson's, the mean of ``v' H v`` over vectors v of random
    signs, with its standard error. The density is stochastic Lanczos quadrature. All are made of exact products. Rank 0
    solves, with memory for max(20, 2 top + 1) and for lanczos_steps vectors as long as the weights.

    Args:
        objective: the loss.
        top: eigenvalues, below the number of weights; 0 for none.
        trace_vectors: draws for the trace; 0 for none.
        density_vectors: draws for the density, of ``lanczos_steps`` products each; 0 for none.
        lanczos_steps: as above.
        tolerance: relative error of the eigenvalues.
        seed: of the random vectors, which no number of processes changes.
        journal: keeps each part that is done, for the next try; None keeps nothing.
        on_product: called on rank 0 with the number of products made so far.

    Raises:
        UserError: for a number out of range.
    """
    check(objective.size, top, trace_vectors, density_vectors, lanczos_steps, tolerance)
    kept = Journal() if journal is None else journal  # an empty one is false
    made = 0
    like = objective.parameters[0]

    def solved(solver: Callable[[Product], Any]) -> Any:
        def counted(product: Product) -> Any:
            def one(v: Tensor) -> Tensor:
                nonlocal made
                made += 1
                if on_product:
                    on_product(made)
                return product(v)

            return solver(one)

        return solve(objective, counted)

    eigenvalues: list[float] = []
    if top:
        start = normal(objective.size, like, seed, "top")
        eigenvalues = kept.get("top", lambda: solved(lambda p: largest_eigenvalues(p, start, top, tolerance)))
    draws = []
    for i in range(trace_vectors):
        v = signs(objective.size, like, seed, "trace", i)
        draws.append(kept.get(f"trace {i}", partial(solved, partial(_along, v))))
    density = []
    for i in range(density_vectors):
        v = signs(objective.size, like, seed, "density", i)
        seen = kept.get(f"density {i}", partial(solved, partial(_seen, v, lanczos_steps)))
        density.append(Quadrature(**seen))
    return Hessian(eigenvalues, mean_with_error(draws) if draws else None, density, made)


def _along(v: Tensor, product: Product) -> float:
    """v' H v."""
    return float(v.double().dot(product(v).double()))


def _seen(v: Tensor, steps: int, product: Product) -> dict[str, list[float]]:
    return asdict(quadrature(product, v, steps))


def check(
    size: int | None, top: int, trace_vectors: int, density_vectors: int, lanczos_steps: int, tolerance: float
) -> None:
    """Raise a `UserError` for a number that `hessian` cannot use; ``size`` None: not known yet."""
    for name, value, least in (
        ("top", top, 0),
        ("trace_vectors", trace_vectors, 0),
        ("density_vectors", density_vectors, 0),
        ("lanczos_steps", lanczos_steps, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}.")
    if size is not None and top >= size:
        raise UserError(f"top is {top}, but the model has {size} weights: ask for fewer eigenvalues than that.")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance:g}: it is a relative error, between 0 and 1.")


def expected_products(top: int, trace_vectors: int, density_vectors: int, lanczos_steps: int) -> int:
    """About how many products `hessian` makes: ARPACK's number depends on the spectrum."""
    return (max(20, 2 * top + 1) + 5 * top if top else 0) + trace_vectors + density_vectors * lanczos_steps


def smoothed(density: Sequence[Quadrature], points: int = 2000) -> tuple[list[float], list[float]]:
    """The density as a curve for the eye: each node a Gaussian, whose deviation is a hundredth of the range seen."""
    import numpy as np

    nodes = np.concatenate([q.nodes for q in density])
    weights = np.concatenate([q.weights for q in density]) / len(density)
    width = 0.01 * float(np.ptp(nodes)) or 1e-3
    x = np.linspace(nodes.min() - 6 * width, nodes.max() + 6 * width, points)
    bells = np.exp(-(((x[:, None] - nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    return x.tolist(), (bells @ weights).tolist()
