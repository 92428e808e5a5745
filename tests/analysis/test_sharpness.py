"""Sharpness over batches against closed forms of each batch, and another number of processes."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.dealing import deal
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.randomness import normal
from lesam_dist.analysis.measures.sharpness import Measure, Sharpness, sharpness
from lesam_dist.analysis.measures.sharpness_plan import SharpnessPlan
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from tests.analysis.quadratics import Quadratic, in_batches, plain_sum, quadratic_of, regression, squared
from tests.parallel import processes

SMALL = SharpnessPlan(
    batch_size=7,
    rho=(0.1, 0.3),
    adaptive_rho=(0.5,),
    linf_rho=(0.05,),
    adaptive_linf_rho=(0.2,),
    std=(0.1,),
    adaptive_std=(0.3,),
    m_sizes=(3, 20),
    sigma=(0.3, 0.1),
    steps=3,
    draws=2,
    directions=2,
    max_radius=1e6,
)


def problem(seed: int) -> tuple[Objective, list[Quadratic]]:
    """23 images, and the loss of each of the three batches of 7."""
    model, x, y = regression(23, 4)
    objective = Objective(model, in_batches(x, y, 10), criterion=squared)
    parts = [batch[0] for batch in deal(objective, 7, seed).batches]
    return objective, [quadratic_of(model, *part) for part in parts]


def agrees(measure: Measure, values: list[float]) -> None:
    assert measure.estimate is not None
    assert measure.estimate.mean == pytest.approx(statistics.fmean(values), rel=1.1e-3)
    assert measure.estimate.draws == len(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    assert measure.estimate.standard_error == pytest.approx(error, rel=1e-2, abs=1e-2 * max(map(abs, values)))


def test_each_number_is_the_mean_over_batches(seed: int) -> None:
    objective, losses = problem(seed)
    w = objective.weights()
    found = sharpness(objective, SMALL, seed=seed)
    assert found.left_out == {7: 2, 3: 2, 20: 3}

    def along(loss: Quadratic, rho: float) -> float:
        return loss.rise(rho * loss.gradient / loss.gradient.norm())

    def root(loss: Quadratic, direction: Tensor, sigma: float) -> float:
        u = direction / direction.norm()
        a, b = float(u @ loss.matrix @ u / 2), float(loss.gradient @ u)
        return float((-b + (b * b + 4 * a * sigma) ** 0.5) / (2 * a))

    norms = [float(loss.gradient.norm()) for loss in losses]
    agrees(found.of("grad_norm")[0], norms)
    for rho, measure in zip(SMALL.rho, found.of("one_step", adaptive=False), strict=True):
        agrees(measure, [along(loss, rho) for loss in losses])
    for sigma, first, rise, along_g, random in zip(
        (0.1, 0.3), *(found.of("radius", kind=k) for k in ("first_order", "rise", "gradient", "random")), strict=True
    ):
        assert first.about["sigma"] == sigma, "budgets are in rising order"
        agrees(first, [sigma / norm for norm in norms])
        agrees(rise, [along(loss, sigma / norm) for loss, norm in zip(losses, norms, strict=True)])
        agrees(along_g, [root(loss, loss.gradient, sigma) for loss in losses])
        rays = [[normal(4, w, seed, "ray", 2 * i + k) for k in range(2)] for i in range(3)]
        pairs = zip(losses, rays, strict=True)
        agrees(random, [statistics.fmean(root(loss, ray, sigma) for ray in two) for loss, two in pairs])
    noises = [[normal(4, w, seed, "average", 2 * i + k) for k in range(2)] for i in range(3)]
    for scale, measure in zip((0.1, 0.3 * w.abs()), found.of("average"), strict=True):
        values = [statistics.fmean(loss.rise(scale * n) for n in two) for loss, two in zip(losses, noises, strict=True)]
        assert measure.estimate is not None
        assert measure.estimate.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-12)
    for m in SMALL.m_sizes:
        batches = [quadratic_of(objective.model, *batch[0]) for batch in deal(objective, m, seed).batches]
        for rho, measure in zip(SMALL.rho, found.of("m_sharpness", m=m), strict=True):
            assert measure.estimate is not None
            expected = statistics.fmean(along(loss, rho) for loss in batches)
            assert measure.estimate.mean == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(objective.weights(), w, rtol=0, atol=0)


def test_passes_are_as_announced_and_batches_may_be_computed_in_parts(seed: int) -> None:
    objective, _ = problem(seed)
    told: list[int] = []
    made = ("forward", "backward")
    for parts in (("one_step",), ("auto_pgd",), ("average",), ("m_sharpness",), SMALL.parts[:4]):
        plan = replace(SMALL, parts=parts)
        whole = sharpness(objective, plan, seed=seed, on_passes=told.append)
        assert whole.passes == pytest.approx(dict(zip(made, plan.passes(), strict=True)))
        assert told[-1] == sum(plan.passes())
    few = replace(plan, adaptive_rho=(), linf_rho=(), std=(), m_sizes=())
    assert sharpness(objective, few, seed=seed).passes == pytest.approx(dict(zip(made, few.passes(), strict=True)))
    pieces = sharpness(objective, plan, seed=seed, at_once=2)
    for one, other in zip(whole.measures, pieces.measures, strict=True):
        assert one.estimate is not None
        assert other.estimate is not None
        assert one.estimate.mean == pytest.approx(other.estimate.mean, rel=1e-6)


def test_radii_that_are_not_reached_are_counted(seed: int) -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    objective = Objective(nn.Linear(3, 1).double(), [(x, x[:, 0])], criterion=plain_sum)
    plan = replace(SMALL, parts=("radius",), batch_size=4, sigma=(1.0,), directions=50, max_radius=1e9)
    found = sharpness(objective, plan, seed=seed)
    losses = [Quadratic(x.new_zeros(4, 4), batch[0][0].mean(dim=0)) for batch in deal(objective, 4, seed).batches]
    down = 0
    for i, loss in enumerate(losses):
        g = torch.cat([loss.gradient, torch.ones(1, dtype=torch.float64)])
        down += sum(float(g @ normal(4, g, seed, "ray", 50 * i + k)) < 0 for k in range(50))
    (random,) = found.of("radius", kind="random")
    assert random.missing == down
    (along,) = found.of("radius", kind="gradient")
    assert along.missing == 0
    capped = sharpness(objective, replace(plan, max_radius=1e-9), seed=seed)
    (along,) = capped.of("radius", kind="gradient")
    assert along.missing == 2
    assert along.numbers()["mean"] is None


def network(world: Distributed, seed: int, plan: SharpnessPlan) -> tuple[list[dict[str, Any]], dict[str, float], bool]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(31, 4), torch.randint(3, (31,))
    own = slice(world.rank * 31 // world.world_size, (world.rank + 1) * 31 // world.world_size)
    before = [value.clone() for value in net.state_dict().values()]
    objective = Objective(net, in_batches(x[own], y[own], 8), world)
    found = sharpness(objective, plan, seed=seed, at_once=5)
    same = all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    return [measure.numbers() for measure in found.measures], found.passes, same


def test_two_processes_find_the_same_bits(seed: int) -> None:
    """Each batch is computed by one process, with the same images in the same order."""
    alone, passes, same = processes.run(network, 1, seed, SMALL)[0]
    assert same, "weights are as before"
    assert len(alone) == 24
    for measures, made, same in processes.run(network, 2, seed, SMALL):
        assert measures == alone
        assert made == pytest.approx(passes)
        assert same


def test_what_was_interrupted_makes_the_missing_passes_alone(seed: int, tmp_path: Path) -> None:
    objective, _ = problem(seed)
    whole = sharpness(objective, SMALL, seed=seed)
    path = tmp_path / "journal"
    sharpness(objective, SMALL, seed=seed, journal=Journal(path, {}))
    lines = path.read_text().splitlines(keepends=True)
    half = len(lines) // 2
    path.write_text("".join(lines[:half]) + lines[half][:10])  # its last line is cut off
    resumed: Sharpness = sharpness(objective, SMALL, seed=seed, journal=Journal(path, {}))
    assert resumed.measures == whole.measures
    assert 0 < resumed.passes["forward"] < whole.passes["forward"]
    again = sharpness(objective, SMALL, seed=seed, journal=Journal(path, {}))
    assert again.passes == {"forward": 0, "backward": 0}
    assert again.measures == whole.measures


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rho": (0.1, 0.0)}, r"^rho is 0: it must be above 0\.$"),
        ({"adaptive_linf_rho": (-1.0,)}, r"^adaptive_linf_rho is -1: it must be above 0\.$"),
        ({"sigma": (0.1, -0.3)}, r"^sigma is -0.3: it must be above 0\.$"),
        ({"std": (float("nan"),)}, r"^std is nan: it must be above 0\.$"),
        ({"max_radius": float("inf")}, r"^max_radius is inf"),
        ({"directions": -1}, r"^directions is -1: it must be at least 0\.$"),
        ({"steps": 0}, r"^steps is 0"),
        ({"draws": 0}, r"^draws is 0"),
        ({"batch_size": 24}, r"^batch_size is 24, but there are 23 images: take more of them, or smaller batches\.$"),
        ({"m_sizes": (3, 40)}, r"^m_sizes is 40, but there are 23 images"),
        ({"parts": ("one_stp",)}, r"^unknown part 'one_stp': did you mean 'one_step'\?$"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    model, x, y = regression(23, 3)
    objective = Objective(model, [(x, y)], criterion=squared)
    with pytest.raises(UserError, match=message):
        sharpness(objective, replace(SMALL, **wrong))
    assert not any(objective.passes.values()), "refused before anything is computed"


def test_of_what_has_no_values_nothing_is_measured() -> None:
    model, x, y = regression(23, 3)
    objective = Objective(model, [(x, y)], criterion=squared)
    plan = replace(SMALL, parts=("one_step", "radius", "m_sharpness"), rho=(), adaptive_rho=(), sigma=())
    assert sharpness(objective, plan).measures == []
    assert not any(objective.passes.values())


def test_the_size_of_batches_that_are_not_asked_for_does_not_matter() -> None:
    model, x, y = regression(23, 3)
    objective = Objective(model, [(x, y)], criterion=squared)
    found = sharpness(objective, replace(SMALL, parts=("m_sharpness",), batch_size=99))
    assert {measure.part for measure in found.measures} == {"m_sharpness"}
