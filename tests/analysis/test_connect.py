"""The path between two checkpoints against closed forms, and on other processes and in other tries."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective, summed_cross_entropy
from lesam_dist.analysis.measures.connect import Connection, connect
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from tests.analysis.nets import conv_net, images, state
from tests.parallel import processes

F64 = torch.float64


def squared(out: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * ((out[:, 0] - targets) ** 2).sum()


def weight(values: Tensor) -> dict[str, Tensor]:
    return {"weight": values}


def test_a_quadratic_has_its_closed_form(seed: int) -> None:
    """L(a) - ((1 - a) L_A + a L_B) = -a (1 - a) / 2 * d' H d for d = w_B - w_A."""
    n, d = 30, 7
    x, y, model = torch.randn(n, d, dtype=F64), torch.randn(n, dtype=F64), nn.Linear(d, 1, bias=False).double()
    objective = Objective(model, [(x[:9], y[:9]), (x[9:], y[9:])], criterion=squared)
    a, b = torch.randn(2, 1, d, dtype=F64)
    found = connect(objective, weight(a), weight(b), points=11)
    ends = [float(squared(x @ w.T, y)) / n for w in (a, b)]
    assert found.loss.ends == pytest.approx(ends, rel=1e-12)
    assert found.batchnorm is None
    gap = (b - a)[0]
    curvature = float(gap @ (x.T @ x / n) @ gap)
    assert found.places == pytest.approx(np.linspace(0, 1, 11))
    for place, value in zip(found.places, found.loss.values, strict=True):
        line = (1 - place) * ends[0] + place * ends[1]
        bow = 0.5 * place * (1 - place) * curvature
        assert value == pytest.approx(line - bow, rel=0, abs=1e-12 * (line + bow))
    assert found.loss.barrier(found.places) == (0, 0), "a convex loss is nowhere above the line"


def test_a_convex_loss_has_no_barrier(seed: int) -> None:
    model, x, y = nn.Linear(6, 4).double(), torch.randn(40, 6, dtype=F64), torch.randint(4, (40,))
    a, b = (deepcopy(model) for _ in range(2))
    for each in (a, b):
        nn.init.normal_(each.weight, std=3)
    found = connect(Objective(model, [(x, y)]), a.state_dict(), b.state_dict(), points=9)
    barrier = found.loss.barrier(found.places)
    assert barrier is not None
    highest = max(value for value in found.loss.values if value is not None)
    assert 0 <= barrier[0] < 1e-13 * highest


def test_permuted_hidden_units_have_a_barrier_between_equal_ends(seed: int) -> None:
    """f(x) = relu(c x) + relu(-c x) = c |x|; between it and itself with the units exchanged, f = |1 - 2a| c |x|."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    x, c = torch.randn(20, 1, dtype=F64), 0.5 + torch.rand(1, dtype=F64)
    targets = c * x[:, 0].abs()
    a = {"0.weight": torch.stack([c, -c]), "2.weight": torch.ones(1, 2, dtype=F64)}
    b = {name: tensor.flip(0 if name[0] == "0" else 1) for name, tensor in a.items()}
    found = connect(Objective(model, [(x, targets)], criterion=squared), a, b, points=5)
    highest = 0.5 * float((targets**2).mean())
    expected = [highest * (1 - abs(1 - 2 * place)) ** 2 for place in found.places]
    assert found.loss.values == pytest.approx(expected, rel=1e-12)
    assert found.loss.ends == [0, 0]
    assert found.loss.barrier(found.places) == (pytest.approx(highest), 0.5)


def test_a_checkpoint_and_itself_have_no_barrier_at_all(seed: int) -> None:
    net, batches = conv_net(), images(8, 5)
    found = connect(Objective(net, batches), net.state_dict(), state(net), points=21)
    assert len(set(found.loss.values)) == 1
    assert found.loss.barrier(found.places) == found.error.barrier(found.places) == (0, 0)


def test_error_rates_are_counted(seed: int) -> None:
    """From W to -W, where all predictions turn over in the middle, at which all outputs are equal: the first class."""
    model, x, y = nn.Linear(3, 2, bias=False).double(), torch.randn(41, 3, dtype=F64), torch.randint(2, (41,))
    w = torch.randn(2, 3, dtype=F64)
    found = connect(Objective(model, [(x[:30], y[:30]), (x[30:], y[30:])]), weight(w), weight(-w), points=5)
    before = 100 * float(((x @ w.T).argmax(dim=1) != y).double().mean())
    middle = 100 * float((y != 0).double().mean())
    assert found.error.values == pytest.approx([before, before, middle, 100 - before, 100 - before])
    assert found.error.ends == pytest.approx([before, 100 - before])
    barrier = found.error.barrier(found.places)
    assert barrier is not None
    lines = np.linspace(before, 100 - before, 5)
    assert barrier[0] == pytest.approx(max(np.array(found.error.values, dtype=float) - lines), abs=1e-12)


def path(
    seed: int,
    world: Distributed | None = None,
    journal: Journal | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Connection, int]:
    """7 places, and the forwards that this process has made."""
    torch.manual_seed(seed)
    net, other, batches = conv_net(), conv_net(), images(8, 5)
    before = state(net)
    objective = Objective(net.train(), batches, criterion=criterion)
    try:
        found = connect(objective, net.state_dict(), other.state_dict(), points=7, world=world, journal=journal)
    finally:
        torch.testing.assert_close(state(net), before, rtol=0, atol=0)
        assert net.training
    return found, objective.passes["forward"]


def test_the_ends_are_the_checkpoints_and_the_model_is_as_before(seed: int) -> None:
    found, forwards = path(seed)
    assert forwards == 2 + 2 * 7
    torch.manual_seed(seed)
    first, second, batches = conv_net(), conv_net(), images(8, 5)
    for k, net in ((0, first), (-1, second)):
        objective = Objective(net, batches)
        assert (found.loss.ends[k], found.error.ends[k]) == objective.loss_and_error()
        objective.estimate_batchnorm()
        assert (found.loss.values[k], found.error.values[k]) == objective.loss_and_error()
        assert objective.loss() == pytest.approx(found.loss.values[k], rel=1e-12)


def test_interpolated_statistics_are_the_averages(seed: int) -> None:
    first, second, batches = conv_net(), conv_net(), images(8, 5)
    a, b = state(first), state(second)
    between = {name: 0.75 * a[name] + 0.25 * b[name] for name in a}
    found = connect(Objective(first, batches), a, b, points=5, batchnorm="interpolate")
    second.load_state_dict(between)
    assert found.loss.values[1] == pytest.approx(Objective(second, batches).loss(), rel=1e-10)
    assert [found.loss.values[0], found.loss.values[-1]] == found.loss.ends
    assert found.batchnorm == "interpolate"


def test_a_killed_try_goes_on(seed: int, tmp_path: Path) -> None:
    calls: list[int] = []

    def killed(logits: Tensor, labels: Tensor) -> Tensor:
        if len(calls) == 2 * 8:  # batches of the first meeting's points; there are 9 points
            raise KeyboardInterrupt
        calls.append(1)
        return summed_cross_entropy(logits, labels)

    expected, _ = path(seed)
    with pytest.raises(KeyboardInterrupt):
        path(seed, journal=Journal(tmp_path / "journal", {}), criterion=killed)
    found, forwards = path(seed, journal=Journal(tmp_path / "journal", {}))
    assert found == expected
    assert forwards == 2


def together(world: Distributed, seed: int) -> dict[str, Any]:
    """The path with its places on both; and statistics of shares of the images, one with one batch more."""
    found, _ = path(seed, world)
    torch.manual_seed(seed)
    net, batches = conv_net(), images(4, 3, 5)
    Objective(net, batches[:1] if world.rank == 0 else batches[1:], world).estimate_batchnorm()
    return {"found": found, "statistics": [tensor.numpy() for tensor in net.buffers() if tensor.is_floating_point()]}


def test_two_processes_find_the_same(seed: int) -> None:
    alone, _ = path(seed)
    torch.manual_seed(seed)
    net, batches = conv_net(), images(4, 3, 5)
    Objective(net, batches).estimate_batchnorm()
    statistics = [tensor.numpy() for tensor in net.buffers() if tensor.is_floating_point()]
    for rank in processes.run(together, 2, seed):
        assert rank["found"].loss.values == pytest.approx(alone.loss.values, rel=1e-12)
        assert rank["found"].error == alone.error
        for here, expected in zip(rank["statistics"], statistics, strict=True):
            np.testing.assert_allclose(here, expected, rtol=1e-12, atol=1e-14)


def test_a_loss_that_is_not_finite_leaves_the_barrier_unknown() -> None:
    model, batch = nn.Linear(1, 1, bias=False).double(), (torch.ones(4, 1, dtype=F64), torch.zeros(4))
    objective = Objective(model, [batch], criterion=lambda out, _: out.log().sum())
    ones = torch.ones(1, 1, dtype=F64)
    found = connect(objective, weight(ones), weight(-ones), points=4)
    assert found.nonfinite == 2
    assert found.loss.values[2:] == found.error.values[2:] == [None, None]
    assert found.loss.ends == [0, None]
    numbers = found.numbers()
    assert numbers["loss_barrier"] is numbers["error_barrier"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points": 1}, "points is 1: a path needs"),
        ({"batchnorm": "none"}, "batchnorm is 'none'"),
        ({"second": {"weight": torch.zeros(2, 3)}}, r"the second weights are not of this model: its weight has"),
        ({"first": {"bias": torch.zeros(2)}}, "the first weights are not of this model: it has no weight"),
    ],
)
def test_what_cannot_be_used_is_refused(wrong: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    objective = Objective(model, [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))])
    own = model.state_dict()
    with pytest.raises(UserError, match=message):
        connect(objective, **{"first": own, "second": own, **wrong})
