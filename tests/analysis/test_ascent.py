"""Rises of the loss within a distance against closed forms and the trust region's own solution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lesam_dist.analysis.engine.ascent import auto_pgd, average_rise, checkpoints, one_step
from lesam_dist.analysis.engine.objective import Objective
from tests.analysis.quadratics import F64, Quadratic, in_batches, plain_sum, quadratic_of, regression, squared

Vector = NDArray[np.float64]


def highest_in_ball(loss: Quadratic, rho: float) -> float:
    """max g'd + d'Ad/2 over ||d|| <= rho, A positive semidefinite: d = (mu - A)^-1 g, mu from the secular equation."""
    values, basis = np.linalg.eigh(loss.matrix.numpy())
    g = basis.T @ loss.gradient.numpy()
    low, high = values[-1], values[-1] + np.linalg.norm(g) / rho  # ||d|| is infinite at one, at most rho at the other
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if np.linalg.norm(g / (mu - values)) > rho else (low, mu)
    d = g / (high - values)
    return float(g @ d + (values * d * d).sum() / 2)


def scaled(loss: Quadratic, scale: Tensor) -> Quadratic:
    """The same in u, with d = scale * u."""
    return Quadratic(scale[:, None] * loss.matrix * scale, scale * loss.gradient)


def test_one_step_is_the_closed_form(seed: int) -> None:
    model, x, y = regression(20, 6)
    objective, loss = Objective(model, in_batches(x, y, 9), criterion=squared), quadratic_of(model, x, y)
    g, w = loss.gradient, objective.weights()
    rhos = (0.05, 0.7)
    expected = [loss.rise(rho * g / g.norm()) for rho in rhos]
    assert one_step(objective, rhos) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    expected = [loss.rise(rho * w**2 * g / (w * g).norm()) for rho in rhos]
    assert one_step(objective, rhos, adaptive=True) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)
    assert objective.passes == {"forward": 6, "backward": 2}


@pytest.mark.parametrize("adaptive", [False, True])
def test_auto_pgd_solves_the_trust_region(seed: int, adaptive: bool) -> None:
    """Where rho <= ||g|| / (2 lambda_1) a step of 2 rho contracts by at least 2/3, and the rise by the square."""
    model, x, y = regression(20, 6)
    objective = Objective(model, in_batches(x, y, 9), criterion=squared)
    w = objective.weights()
    loss = scaled(quadratic_of(model, x, y), w.abs() if adaptive else torch.ones_like(w))
    unit = float(loss.gradient.norm() / torch.linalg.eigvalsh(loss.matrix)[-1])
    for relative in (0.1, 0.5, 3.0):
        rho = relative * unit
        highest = highest_in_ball(loss, rho)
        found = auto_pgd(objective, rho, adaptive=adaptive)
        assert found <= highest * (1 + 1e-9) + 1e-12, "never more than there is"
        first = one_step(objective, [rho], adaptive=adaptive)[0]
        assert found >= first * (1 - 1e-9) - 1e-12, "its first step is SAM's"
        if relative <= 0.5:
            assert found >= highest * (1 - 1e-4) - 1e-12
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)


def test_on_a_linear_loss_every_ball_has_its_closed_form(seed: int) -> None:
    x = torch.randn(11, 7, dtype=F64)
    objective = Objective(nn.Linear(7, 1, bias=False).double(), [(x, x[:, 0])], criterion=plain_sum)
    g, w = x.mean(dim=0), objective.weights().abs()
    rho = 0.03
    for norm, adaptive, expected in (
        ("l2", False, g.norm()),
        ("l2", True, (w * g).norm()),
        ("linf", False, g.abs().sum()),
        ("linf", True, (w * g).abs().sum()),
    ):
        found = auto_pgd(objective, rho, norm=norm, adaptive=adaptive)
        assert found == pytest.approx(rho * float(expected), rel=1e-9, abs=1e-12), (norm, adaptive)


def test_in_a_box_auto_pgd_finds_the_best_corner(seed: int) -> None:
    """A convex loss is highest in a corner: no corner has more, and where g outweighs A, its own sign is the best."""
    model, x, y = regression(20, 5)
    objective, loss = Objective(model, [(x, y)], criterion=squared), quadratic_of(model, x, y)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 5)
    small = 0.5 * float((loss.gradient.abs() / loss.matrix.abs().sum(dim=0)).min())  # no gradient in the box turns
    for rho in (small, 0.5):
        highest = max(loss.rise(rho * corner) for corner in corners)
        found = auto_pgd(objective, rho, norm="linf")
        assert found <= highest * (1 + 1e-9) + 1e-12
        assert found >= loss.rise(rho * loss.gradient.sign()) - 1e-12, "its first step goes to that corner"
        if rho == small:
            assert found == pytest.approx(highest, rel=1e-9, abs=1e-12)


def test_at_a_minimum_auto_pgd_goes_up_and_one_step_nowhere(seed: int) -> None:
    x = torch.diag(torch.tensor([3.0, 1.0], dtype=F64))
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    objective = Objective(model, [(x, torch.zeros(2, dtype=F64))], criterion=squared)  # A = diag(9, 1) / 2
    assert one_step(objective, [0.1]) == [0.0]
    assert auto_pgd(objective, 0.1) == pytest.approx(0.01 * 4.5 / 2, rel=1e-6)
    assert auto_pgd(objective, 0.1, adaptive=True) == 0, "all weights are zero, and stay"


def test_at_a_maximum_nothing_is_below_the_clean_loss() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.eye(2, dtype=F64)
    objective = Objective(model, [(x, torch.zeros(2, dtype=F64))], criterion=lambda out, y: -squared(out, y))
    assert auto_pgd(objective, 0.1) == 0
    assert auto_pgd(objective, 0.1, norm="linf") == 0


def history(
    f: Callable[[Vector], tuple[float, Vector]], rho: float, norm: str, scale: Vector, steps: int
) -> tuple[list[float], float]:
    """Auto-PGD as it is published, from lists of all points and losses: every loss, and the last step's length."""

    def projected(u: Vector) -> Vector:
        return np.clip(u, -rho, rho) if norm == "linf" else u * min(1.0, rho / max(float(np.linalg.norm(u)), 1e-300))

    def ascent(u: Vector) -> Vector:
        g = scale * f(scale * u)[1]
        return np.sign(g) if norm == "linf" else g / np.linalg.norm(g)

    step, ends = 2 * rho, [0, *sorted(checkpoints(steps))]
    points = [np.zeros_like(scale), projected(step * ascent(np.zeros_like(scale)))]
    before = points[0]
    losses = [f(scale * u)[0] for u in points]
    rose, steps_at, best_at = [losses[1] > losses[0]], [step], [losses[0]]
    now = points[1]
    for k in range(1, steps + 1):
        if k in ends:
            j = ends.index(k)
            few = sum(rose[ends[j - 1] : k]) < 0.75 * (k - ends[j - 1])
            stuck = (j == 1 or steps_at[-1] == steps_at[-2]) and best_at[-1] == max(losses)
            best_at.append(max(losses))
            if few or stuck:
                step, now = step / 2, points[int(np.argmax(losses))]
            steps_at.append(step)
        if k == steps:
            break
        z = projected(now + step * ascent(now))
        new = projected(now + 0.75 * (z - now) + 0.25 * (now - before))
        rose.append(f(scale * new)[0] > f(scale * now)[0])
        losses.append(f(scale * new)[0])
        points.append(new)
        now, before = new, now
    return losses, step


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_auto_pgd_is_the_published_algorithm(seed: int, norm: str, adaptive: bool) -> None:
    """On a loss with a maximum inside the ball, where steps must shrink: -(w - c)'A(w - c) / 2."""
    model, x, y = regression(8, 3)
    objective = Objective(model, [(x, y)], criterion=lambda out, targets: -squared(out, targets))
    loss, w = quadratic_of(model, x, y), objective.weights()
    scale = (w.abs() if adaptive else torch.ones_like(w)).numpy()
    g, matrix = -loss.gradient.numpy(), -loss.matrix.numpy()

    def f(d: Vector) -> tuple[float, Vector]:
        return float(g @ d + d @ matrix @ d / 2), g + matrix @ d

    for rho in (0.3, 3.0):
        losses, _ = history(f, rho, norm, scale, 20)
        found = auto_pgd(objective, rho, norm=norm, adaptive=adaptive)
        assert found == pytest.approx(max(losses), rel=1e-6, abs=1e-9)
    losses, step = history(f, 1e3, norm, scale, 20)
    assert step < 2e3, "it has been halved"


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_is_half_the_trace(seed: int, adaptive: bool) -> None:
    model, x, y = regression(30, 6)
    objective, loss = Objective(model, [(x, y)], criterion=squared), quadratic_of(model, x, y)
    w, draws = objective.weights(), 400
    stds = (0.1, 0.5)
    for std, found in zip(stds, average_rise(objective, stds, draws=draws, seed=seed, adaptive=adaptive), strict=True):
        scale = std * (w.abs() if adaptive else torch.ones_like(w))
        error = (loss.noise_variance(scale) / draws) ** 0.5  # six are once in 10^7 for a single square
        assert abs(found - loss.noise_mean(scale)) < 6 * error
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)


def test_draws_go_on_where_others_have_ended(seed: int) -> None:
    model, x, y = regression(10, 3)
    objective = Objective(model, [(x, y)], criterion=squared)
    whole, first, second = (
        average_rise(objective, [0.1], draws=draws, first=first, seed=seed)[0]
        for draws, first in ((6, 0), (2, 0), (4, 2))
    )
    assert 6 * whole == pytest.approx(2 * first + 4 * second, rel=1e-9, abs=1e-12)


def test_checkpoints_are_those_of_auto_pgd() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(20)) == [5, 9, 12, 14, 16, 18, 19, 20]
