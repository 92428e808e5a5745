"""Radii of a loss budget against roots in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.rays import radii
from tests.analysis.quadratics import F64, plain_sum, quadratic_of, regression, squared


@pytest.mark.parametrize("start", [1e-4, 50.0])
def test_the_radius_is_the_root_of_a_quadratic_equation(seed: int, start: float) -> None:
    model, x, y = regression(20, 6)
    objective, loss = Objective(model, [(x, y)], criterion=squared), quadratic_of(model, x, y)
    w, budgets = objective.weights(), [0.1, 0.3, 1.0]
    for direction in (loss.gradient, torch.randn(6, dtype=F64), -loss.gradient):  # the last one goes down first
        u = direction / direction.norm()
        a, b = float(u @ loss.matrix @ u / 2), float(loss.gradient @ u)
        roots = [(-b + math.sqrt(b * b + 4 * a * sigma)) / (2 * a) for sigma in budgets]
        found = radii(objective, direction, budgets, loss=objective.loss(), start=start, maximum=1e9)
        for radius, root in zip(found, roots, strict=True):
            assert radius is not None
            assert root * (1 - 1e-9) <= radius <= root * 1.0011  # the upper end, and its relative error is 1e-3
        largest = (roots[0] + roots[1]) / 2
        capped = radii(objective, direction, budgets, loss=objective.loss(), start=start, maximum=largest)
        assert capped[0] == pytest.approx(roots[0], rel=1.1e-3)
        assert capped[1:] == [None, None]
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)


def test_a_loss_that_never_rises_has_no_radius(seed: int) -> None:
    x = torch.randn(5, 3, dtype=F64)
    objective = Objective(nn.Linear(3, 1).double(), [(x, x[:, 0])], criterion=plain_sum)
    loss, gradient = objective.gradient()
    assert radii(objective, -gradient, [0.1], loss=loss, start=0.1, maximum=7.0) == [None]
    assert objective.passes["forward"] == 1 + 8, "at 0.1, 0.2, ..., 6.4, 7"


def test_a_loss_that_is_not_a_number_has_risen() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.ones(1, 1, dtype=F64)
    objective = Objective(model, [(x, x[:, 0])], criterion=lambda out, _: -torch.log(1 - out).sum())
    found = radii(objective, torch.ones(1, dtype=F64), [5.0], loss=0.0, start=0.75, maximum=100.0)
    assert found[0] == pytest.approx(1 - math.exp(-5), rel=1e-3)
