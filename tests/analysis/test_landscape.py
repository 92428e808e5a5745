"""Landscapes against closed forms, directions filter by filter, and points on other processes and in other tries."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Batch, Objective, summed_cross_entropy
from lesam_dist.analysis.engine.output import Output
from lesam_dist.analysis.measures.landscape import filter_normalised, grid, landscape
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from tests.parallel import processes

F64 = torch.float64
ALONE = Distributed(0, 0, 1, torch.device("cpu"))


def squared(out: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((out[:, 0] - targets) ** 2).sum()


def conv_net(seed: int) -> tuple[nn.Sequential, list[Batch]]:
    """With everything that must not change: BatchNorm's statistics, dropout, and the mode; in two batches."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    ).double()
    nn.init.uniform_(net[1].running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)  # type: ignore[arg-type]
    x, y = torch.randn(11, 2, 4, 4, dtype=F64), torch.randint(3, (11,))
    return net, [(x[:8], y[:8]), (x[8:], y[8:])]


def counting(calls: list[int], last: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross entropy, which counts its batches; before the one after the ``last``, the process is killed."""

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(1)
        return summed_cross_entropy(logits, labels)

    return criterion


@pytest.mark.parametrize("dims", [1, 2])
def test_a_quadratic_has_its_closed_form(seed: int, dims: int) -> None:
    n, d = 30, 7
    x, y, model = torch.randn(n, d, dtype=F64), torch.randn(n, dtype=F64), nn.Linear(d, 1, bias=False).double()
    objective = Objective(model, [(x[:9], y[:9]), (x[9:], y[9:])], criterion=squared)
    hessian = x.T @ x / n
    loss, gradient = objective.gradient()
    directions = [torch.randn(d, dtype=F64) for _ in range(dims)]
    coordinates = grid(5, 1.5)
    found = landscape(objective, directions, coordinates)
    assert found.losses.shape == (5,) * dims
    assert found.nonfinite == 0
    for place in np.ndindex(found.losses.shape):
        step = torch.zeros(d, dtype=F64)
        for k, direction in zip(place, directions, strict=True):
            step += coordinates[k] * direction
        terms = loss, float(gradient @ step), float(0.5 * step @ hessian @ step)
        # The terms may cancel: rounding is relative to them, not to their sum.
        assert found.losses[place] == pytest.approx(sum(terms), rel=0, abs=1e-12 * sum(map(abs, terms)))


def test_each_filter_is_as_long_as_the_weights(seed: int) -> None:
    net, batches = conv_net(seed)
    objective = Objective(net, batches)
    first, second = (filter_normalised(objective, seed, k) for k in (0, 1))
    for part, p in zip(objective.unflatten(first), net.parameters(), strict=True):
        if p.dim() < 2:
            assert not part.any()
        else:  # 1e-10 beside the norm of 16 or more normal numbers
            torch.testing.assert_close(part.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1), rtol=1e-8, atol=0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, filter_normalised(objective, seed + 1, 0))


def test_checkpoints_share_the_random_numbers_of_a_seed(seed: int) -> None:
    """Scaled by their own weights, and in their own dtype: directions of filters are the same."""
    net, batches = conv_net(seed)
    other, _ = conv_net(seed + 1)
    extended = nn.Sequential(*conv_net(seed + 2)[0], nn.Linear(3, 3)).double()
    here = Objective(net, batches)
    units = [_units(here, net, seed), *(_units(Objective(each, batches), each, seed) for each in (other, extended))]
    for conv, linear in units[1:]:
        torch.testing.assert_close(conv, units[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(linear, units[0][1], rtol=1e-9, atol=1e-12)
    single = filter_normalised(Objective(net.float(), batches), seed, 0)
    assert single.dtype == torch.float32
    # Weights, numbers and products are rounded to 24 bits each.
    torch.testing.assert_close(single.double(), filter_normalised(here, seed, 0).double(), rtol=1e-5, atol=1e-6)


def _units(objective: Objective, net: nn.Sequential, seed: int) -> tuple[Tensor, Tensor]:
    parts = objective.unflatten(filter_normalised(objective, seed, 0))
    conv, linear = (part.flatten(1) for part in (parts[0], parts[4]))
    assert linear.shape == (3, 16)
    return conv / conv.norm(dim=1, keepdim=True), linear / linear.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("last", [None, 13])
def test_the_model_is_as_before(seed: int, last: int | None) -> None:
    """Also where a point fails."""
    net, batches = conv_net(seed)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    objective = Objective(net.train(), batches, criterion=counting([], last))
    directions = [filter_normalised(objective, seed, k) for k in (0, 1)]
    if last is None:
        landscape(objective, directions, grid(3, 1))
    else:
        with pytest.raises(KeyboardInterrupt):
            landscape(objective, directions, grid(3, 1))
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert net.training


def surface(
    seed: int, world: Distributed | None = None, journal: Journal | None = None, last: int | None = None
) -> tuple[np.ndarray[Any, Any], int]:
    """25 points, and how many of them this process has made."""
    net, batches = conv_net(seed)
    calls: list[int] = []
    objective = Objective(net, batches, criterion=counting(calls, last))
    directions = [filter_normalised(objective, seed, k) for k in (0, 1)]
    known: list[int] = []
    found = landscape(objective, directions, grid(5, 1), world=world, journal=journal, on_point=known.append)
    assert known[-1] == 25
    assert len(calls) == len(batches) * objective.passes["forward"]
    return found.losses, objective.passes["forward"]


def killed(path: Path, seed: int) -> int:
    """A try that is killed after more than half of the points; returns how many are in its journal."""
    journal = Journal(path, {"seed": seed})
    with pytest.raises(KeyboardInterrupt):
        surface(seed, journal=journal, last=2 * 19)
    return len(journal)


def test_a_killed_try_goes_on(seed: int, tmp_path: Path) -> None:
    expected, made = surface(seed)
    assert made == 25
    done = killed(tmp_path / "journal", seed)
    assert 12 < done <= 19
    found, made = surface(seed, journal=Journal(tmp_path / "journal", {"seed": seed}))
    np.testing.assert_array_equal(found, expected)
    assert made == 25 - done


def shared(world: Distributed, seed: int, path: Path) -> list[Any]:
    """Points of this process and all losses: from the beginning, and after a try of one process."""
    return [surface(seed, world), surface(seed, world, Journal(path, {"seed": seed}, world))]


def test_two_processes_share_an_odd_number_of_points(seed: int, tmp_path: Path) -> None:
    alone, _ = surface(seed)
    done = killed(tmp_path / "journal", seed)
    ranks = processes.run(shared, 2, seed, tmp_path / "journal")
    for anew, resumed in ranks:
        for losses, _ in (anew, resumed):
            np.testing.assert_allclose(losses, alone, rtol=1e-12)
    assert [anew[1] for anew, _ in ranks] == [13, 12]
    assert sum(resumed[1] for _, resumed in ranks) == 25 - done


def test_points_without_a_finite_loss_are_counted_and_null(tmp_path: Path) -> None:
    """The mean of log(w x) at x = 1 and w from -0.5 to 1.5: nan, -inf, and three numbers."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    batch = torch.ones(4, 1, dtype=F64), torch.zeros(4)
    objective = Objective(model, [batch], criterion=lambda out, _: out.log().sum())
    journal = Journal(tmp_path / "journal", {})
    direction = torch.ones(1, dtype=F64)
    found = landscape(objective, [direction], grid(5, 1), journal=journal)
    assert found.nonfinite == 2
    np.testing.assert_allclose(found.losses, [math.nan, math.nan, math.log(0.5), 0, math.log(1.5)], atol=1e-15)
    Output(tmp_path, "it", {}, ALONE).write({"losses": found.losses.tolist()}, {})
    assert json.loads((tmp_path / "it.json").read_text())["results"]["losses"][:2] == [None, None]
    made = objective.passes["forward"]
    again = landscape(objective, [direction], grid(5, 1), journal=Journal(tmp_path / "journal", {}))
    np.testing.assert_array_equal(again.losses, found.losses)
    assert objective.passes["forward"] == made, "what is not finite is known too"


def test_the_middle_of_a_grid_is_the_checkpoint(seed: int) -> None:
    net, batches = conv_net(seed)
    objective = Objective(net, batches)
    for points in (3, 21, 51):
        coordinates = grid(points, 0.7)
        assert (coordinates[0], coordinates[points // 2], coordinates[-1]) == (-0.7, 0, 0.7)
        np.testing.assert_allclose(np.diff(coordinates), 1.4 / (points - 1), rtol=1e-12)
    found = landscape(objective, [filter_normalised(objective, seed, 0)], grid(3, 1))
    assert found.losses[1] == objective.loss()


@pytest.mark.parametrize(
    ("points", "reach", "message"),
    [(1, 1.0, "points is 1"), (5, 0.0, "range is 0"), (5, -1.0, "range is -1"), (5, math.nan, "range is nan")],
)
def test_a_grid_without_extent_is_refused(points: int, reach: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid(points, reach)


def test_shares_of_images_beside_shares_of_points_are_refused(seed: int) -> None:
    net, batches = conv_net(seed)
    objective, two = Objective(net, batches), Distributed(0, 0, 2, torch.device("cpu"))
    objective.world = two
    with pytest.raises(ValueError, match="an objective of its own"):
        landscape(objective, [objective.weights()], [0.0], world=two)
    with pytest.raises(UserError, match="at least one direction"):
        landscape(objective, [], [0.0])
