"""Eigenvalues of a symmetric matrix of which only products with vectors are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesam_dist.errors import UserError

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quadrature:
    """The spectral density as one vector sees it: weights (m,), which sum to 1, at the nodes (m,), sorted."""

    nodes: list[float]
    weights: list[float]


def largest_eigenvalues(product: Product, start: Tensor, k: int, tolerance: float) -> list[float]:
    """The ``k`` largest eigenvalues, largest first, by the implicitly restarted Lanczos method (ARPACK, by scipy).

    Args:
        product: with a symmetric n x n matrix.
        start: vector (n,) to begin with.
        k: at most n - 1.
        tolerance: relative error of the eigenvalues at which it stops.

    Raises:
        UserError: they have not converged in 10 * n restarts, which a matrix of exact products cannot make happen.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def matvec(v: NDArray[np.floating]) -> NDArray[np.floating]:
        found: NDArray[np.floating] = product(torch.from_numpy(v.ravel().copy()).to(start)).cpu().numpy()
        return found

    first = start.cpu().numpy()
    operator = LinearOperator((first.size, first.size), matvec=matvec, dtype=first.dtype)
    try:
        values = eigsh(operator, k, which="LA", v0=first, tol=tolerance, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        raise UserError(
            f"{len(error.eigenvalues)} of {k} eigenvalues have converged to a relative error of {tolerance:g}: allow a "
            "larger one with --tolerance, or ask for fewer with --top."
        ) from error
    return sorted(map(float, values), reverse=True)


def quadrature(product: Product, start: Tensor, steps: int) -> Quadrature:
    """Gauss quadrature of the spectral density that ``start`` sees, by Lanczos with full reorthogonalisation.

    With v = start/||start|| and T the tridiagonal matrix after m steps, nodes are T's eigenvalues and weights the
    squared first components of its eigenvectors: ``sum_i weight_i p(node_i) = v' p(A) v`` for every polynomial p of
    degree up to 2m - 1 (Golub and Meurant; used for networks by Ghorbani, Krishnan and Xiao, 2019).

    Args:
        product: with a symmetric n x n matrix.
        start: (n,), not zero.
        steps: m, products to make; fewer where the vectors that can be reached are all found.
    """
    steps = min(steps, start.numel())
    basis = torch.zeros(steps, start.numel(), dtype=start.dtype, device=start.device)
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        image = product(basis[step])
        diagonal.append(float(basis[step].dot(image)))
        for _ in range(2):  # what one round leaves of the others is of the order of rounding errors
            image = image - basis[: step + 1].T @ (basis[: step + 1] @ image)
        length = float(image.norm())
        if step == steps - 1 or length <= torch.finfo(start.dtype).eps * max(map(abs, (*diagonal, *beside))) * 10:
            break
        beside.append(length)
        basis[step + 1] = image / length
    n = len(diagonal)
    tridiagonal = np.diag(diagonal) + np.diag(beside[: n - 1], 1) + np.diag(beside[: n - 1], -1)
    nodes, vectors = np.linalg.eigh(tridiagonal)
    return Quadrature(nodes.tolist(), (vectors[0] ** 2).tolist())
