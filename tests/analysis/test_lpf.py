"""The low-pass filtered loss against closed forms, direct evaluation, and another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.randomness import normal
from lesam_dist.analysis.measures.lpf import lpf, lpf_one_pass
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from tests.analysis.quadratics import F64, in_batches, quadratic_of, regression, shared, squared
from tests.parallel import processes


def test_on_a_quadratic_the_difference_is_half_the_trace(seed: int) -> None:
    model, x, y = regression(40, 8)
    sigma, draws = 0.3, 400
    loss = quadratic_of(model, x, y)
    scale = torch.full((8,), sigma, dtype=F64)
    found = lpf(Objective(model, in_batches(x, y, 13), criterion=squared), sigma=sigma, draws=draws, seed=seed)
    error = (loss.noise_variance(scale) / draws) ** 0.5  # six are once in 10^9
    assert abs(found.difference - loss.noise_mean(scale)) < 6 * error
    assert found.lpf.standard_error == pytest.approx(error, rel=0.5)
    assert found.lpf.draws == draws == len(found.losses)


def test_one_pass_is_unbiased(seed: int) -> None:
    model, x, y = regression(24, 5)
    sigma, draws = 0.3, 200
    objective = Objective(model, in_batches(x, y, 9), criterion=squared)
    batches = in_batches(x, y, 9)
    scale = torch.full((5,), sigma, dtype=F64)
    error = sum(quadratic_of(model, *b).noise_variance(scale) * (len(b[1]) / 24) ** 2 for b in batches) ** 0.5
    mean = sum(lpf_one_pass(objective, sigma, seed + i) for i in range(draws)) / draws
    expected = objective.loss() + quadratic_of(model, x, y).noise_mean(scale)
    assert abs(mean - expected) < 6 * error / draws**0.5
    assert objective.passes == {"forward": draws + 1, "backward": 0}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def test_each_draw_is_a_direct_evaluation_and_leaves_no_trace(seed: int) -> None:
    net, x, y = network(), torch.randn(20, 4), torch.randint(3, (20,))
    before = [value.clone() for value in net.state_dict().values()]
    objective = Objective(net.train(), in_batches(x, y, 8))
    found = lpf(objective, sigma=0.1, draws=3, seed=seed)
    once = lpf_one_pass(objective, 0.1, seed)
    torch.testing.assert_close([*net.state_dict().values()], before, rtol=0, atol=0)
    assert net.training

    def loss(images: torch.Tensor, labels: torch.Tensor, name: str, index: int) -> float:
        other, size = network(), objective.size
        other.load_state_dict(net.state_dict())
        flat = objective.weights() + 0.1 * normal(size, before[0], seed, name, index)
        nn.utils.vector_to_parameters(flat, other.parameters())
        return float(F.cross_entropy(other.eval()(images), labels).detach())

    for i in range(3):
        assert found.losses[i] == pytest.approx(loss(x, y, "lpf", i), rel=1e-5)
    assert found.losses[0] != found.losses[1]
    assert found.loss == pytest.approx(float(F.cross_entropy(net.eval()(x), y).detach()), rel=1e-5)
    parts = [loss(*batch, "lpf of a batch", i) * len(batch[1]) for i, batch in enumerate(in_batches(x, y, 8))]
    assert once == pytest.approx(sum(parts) / 20, rel=1e-5)


def test_what_was_interrupted_makes_the_missing_passes_alone(seed: int, tmp_path: Path) -> None:
    model, x, y = regression(20, 4)
    objective = Objective(model, in_batches(x, y, 20), criterion=squared)
    whole = lpf(objective, draws=6, seed=seed)
    path = tmp_path / "journal"
    lpf(objective, draws=3, seed=seed, journal=Journal(path, {}))
    objective.passes["forward"] = 0
    seen: list[int] = []
    assert lpf(objective, draws=6, seed=seed, journal=Journal(path, {}), on_draw=seen.append) == whole
    assert objective.passes["forward"] == 3
    assert seen == [1, 2, 3, 4, 5, 6]


def parts(world: Distributed, seed: int) -> tuple[dict[str, Any], float]:
    torch.manual_seed(seed)
    model, x, y = regression(28, 5)
    objective = shared(model, x, y, world)  # batches of 7: the same ones on 1 and on 2 processes
    return lpf(objective, sigma=0.2, draws=4, seed=seed).numbers(), lpf_one_pass(objective, 0.2, seed)


def test_two_processes_find_what_one_does(seed: int) -> None:
    alone = processes.run(parts, 1, seed)[0]
    for numbers, once in processes.run(parts, 2, seed):
        assert numbers["losses"] == pytest.approx(alone[0]["losses"], rel=1e-12)
        assert numbers["loss"] == pytest.approx(alone[0]["loss"], rel=1e-12)
        assert once == pytest.approx(alone[1], rel=1e-12)


def test_a_loss_that_overflows_is_a_result() -> None:
    model, x, y = regression(4, 2)
    found = lpf(Objective(model, [(x, y)], criterion=squared), sigma=1e200, draws=2)
    assert found.lpf.mean == float("inf")
    assert found.lpf.standard_error is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "sigma is 0: it must be above 0"),
        ({"sigma": -1.0}, "sigma is -1: it must be above 0"),
        ({"sigma": float("nan")}, "sigma is nan: it must be above 0"),
        ({"draws": 0}, "draws is 0: it must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    model, x, y = regression(4, 2)
    objective = Objective(model, [(x, y)], criterion=squared)
    with pytest.raises(UserError, match=message):
        lpf(objective, **wrong)
    if "sigma" in wrong:
        with pytest.raises(UserError, match=message):
            lpf_one_pass(objective, **wrong)
    assert objective.passes["forward"] == 0, "refused before anything is computed"
