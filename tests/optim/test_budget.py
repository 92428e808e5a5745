"""CosineBudget against the values of the authors' schedule, and as torch's schedulers are used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lesam_dist import LESAM, CosineBudget


def make(sigma: float = 0.35, second: float = 0.35) -> LESAM:
    params = [
        {"params": [nn.Parameter(torch.ones(2))]},
        {"params": [nn.Parameter(torch.ones(2))], "sigma": second},
    ]
    return LESAM(params, torch.optim.SGD, sigma=sigma, lr=0.1)


def test_values_of_the_released_schedule() -> None:
    """sigma0 0.35, 200 epochs, start 160, warm-up 10: the sequence that the authors' code produces per epoch."""
    optimizer = make()
    budget = CosineBudget(optimizer, total_steps=200, anneal_steps=40, warmup_steps=10)
    sigmas = []
    for _ in range(200):
        sigmas.append(optimizer.param_groups[0]["sigma"])
        budget.step()
    expected = {
        0: 0,
        1: 0.038889,
        5: 0.194444,
        9: 0.35,
        100: 0.35,
        159: 0.35,
        160: 0.35,
        170: 0.296227,
        180: 0.167953,
    }
    for epoch, value in expected.items():
        assert sigmas[epoch] == pytest.approx(value, abs=5e-7)
    assert sigmas[199] == 0.0
    assert optimizer.param_groups[0]["sigma"] == 0.0, "past the end it stays zero"


@pytest.mark.parametrize(
    ("total", "anneal", "warmup"), [(1, 1, 0), (1, 0, 1), (5, 1, 0), (2, 1, 1), (7, 7, 0), (3, 0, 0)]
)
def test_short_runs(total: int, anneal: int, warmup: int) -> None:
    optimizer = make(1.0)
    budget = CosineBudget(optimizer, total, anneal, warmup)
    values = [budget.factor(t) for t in range(total)]
    assert all(0 <= v <= 1 for v in values)
    assert values[-1] == (0.0 if anneal else 1.0)


def test_groups_keep_their_own_budget() -> None:
    optimizer = make(sigma=0.4, second=0.1)
    budget = CosineBudget(optimizer, total_steps=3, anneal_steps=3)
    budget.step()
    assert budget.get_last_sigma() == [pytest.approx(0.2), pytest.approx(0.05)]


def test_resume_continues_the_schedule() -> None:
    optimizer = make()
    budget = CosineBudget(optimizer, 20, 15)
    for _ in range(11):
        budget.step()
    fresh = make()
    again = CosineBudget(fresh, 20, 15)
    fresh.load_state_dict(optimizer.state_dict())
    again.load_state_dict(budget.state_dict())
    for _ in range(9):
        assert again.get_last_sigma() == budget.get_last_sigma()
        again.step()
        budget.step()


@pytest.mark.parametrize(
    ("args", "message"),
    [((0, 0, 0), "total_steps=0"), ((10, -1, 0), "anneal_steps=-1"), ((10, 6, 5), "do not fit")],
)
def test_bad_lengths(args: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosineBudget(make(), *args)
