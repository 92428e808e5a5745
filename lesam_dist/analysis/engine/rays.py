"""How far one can go from the weights along a direction until the loss has risen by a budget."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lesam_dist.analysis.engine.objective import Objective


def radii(
    objective: Objective,
    direction: Tensor,
    budgets: Sequence[float],
    *,
    loss: float,
    start: float,
    maximum: float,
    tolerance: float = 1e-3,
) -> list[float | None]:
    """For each budget sigma the radius r with ``L(w + r u) - L(w) = sigma``, u the direction at length 1.

    The radius is doubled from ``start`` until the loss has risen by sigma, a loss that is not a number counting as
    risen, and then bisected. A loss that falls again before it is looked at is missed: where it does not rise steadily
    this is one of several such radii. None where the loss has not risen by sigma within ``maximum``, of which only the
    points looked at are known. About ten forwards for each budget, and one for each doubling.

    Args:
        objective: the loss.
        direction: (size,), not zero.
        budgets: each sigma, above 0, in units of the loss and in rising order.
        loss: L(w).
        start: first radius to look at, above 0.
        maximum: largest one.
        tolerance: relative error of the radii, which are the ends that are not below the budget.
    """
    weights = objective.weights()
    unit = direction / direction.norm()

    def rise(radius: float) -> float:
        with objective.at(weights + radius * unit):
            return objective.loss() - loss

    found: list[float | None] = []
    low, high = 0.0, min(start, maximum)
    for budget in budgets:
        below = rise(high) < budget
        while below and high < maximum:
            low, high = high, min(2 * high, maximum)
            below = rise(high) < budget
        if below:
            found += [None] * (len(budgets) - len(found))
            break
        while high - low > tolerance * high:
            middle = (low + high) / 2
            if rise(middle) < budget:
                low = middle
            else:
                high = middle
        found.append(high)
    return found
