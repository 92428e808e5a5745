"""Sharpness of the loss at a checkpoint, in the senses that are in use, batch by batch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lesam_dist.analysis.engine.ascent import auto_pgd, average_rise, one_step
from lesam_dist.analysis.engine.dealing import Dealt, deal
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.randomness import normal
from lesam_dist.analysis.engine.rays import radii
from lesam_dist.analysis.engine.statistics import Estimate, mean_with_error
from lesam_dist.analysis.measures.sharpness_plan import SharpnessPlan

Value = list[float | None]
"""What one batch says of one number, several times for random directions; None where there is no such radius."""


@dataclass(frozen=True)
class Measure:
    """One number at a checkpoint.

    Attributes:
        part: of `PARTS`; "loss" or "grad_norm" for those of the batches of ``batch_size``.
        about: what else it is of, as {"rho": 0.1, "adaptive": False}.
        estimate: mean over the batches, each of which is the mean of what it says, with its standard error; None where
            no batch says anything.
        missing: how often there was no such radius, or a loss was not finite. These are not in the mean: that of radii
            is too low where some are missing.
    """

    part: str
    about: dict[str, Any]
    estimate: Estimate | None
    missing: int

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        found = self.estimate
        values: dict[str, Any] = {"mean": None, "standard_error": None, "batches": 0}
        if found is not None:
            values = {"mean": found.mean, "standard_error": found.standard_error, "batches": found.draws}
        return {"part": self.part, **self.about, **values, "missing": self.missing}


@dataclass(frozen=True)
class Sharpness:
    """What `sharpness` has found.

    Attributes:
        measures: in the order of the plan.
        left_out: images that did not fill a batch, by its size.
        passes: forwards and backwards over all images that were made, on all processes.
    """

    measures: list[Measure]
    left_out: dict[int, int]
    passes: dict[str, float]

    def of(self, part: str, **about: Any) -> list[Measure]:
        """Those of a part that agree with ``about``."""
        return [m for m in self.measures if m.part == part and about.items() <= m.about.items()]


@dataclass(frozen=True)
class _Unit:
    """Measures of a batch that are made together: what each is of, and the function of a batch and its number."""

    name: str
    labels: list[tuple[str, dict[str, Any]]]
    measure: Callable[[Objective, int], list[Value]]


def sharpness(
    objective: Objective,
    plan: SharpnessPlan | None = None,
    *,
    seed: int = 0,
    at_once: int | None = None,
    journal: Journal | None = None,
    on_passes: Callable[[int], None] | None = None,
) -> Sharpness:
    """How sharp the loss is at the weights that the model has, each batch of m images on its own.

    Each number is one of a batch, and its mean over the batches has a standard error: so each process takes whole
    batches, and they compute without a word to each other. Which images are in which batch, and the noise of a batch,
    depend on ``seed`` alone (`deal`): any number of processes finds the same. The weights come back bit for bit.

    `one_step`, `auto_pgd`, `average_rise` and `radii` say what each part is. Beside the radius of a budget sigma along
    g, and along random directions, are LE-SAM's first-order ``rho(sigma) = sigma / ||g||``, without its rho_max, and
    the rise of the loss there, which is sigma where first order is right.

    Args:
        objective: the loss and all images.
        plan: what to measure; None is all, with defaults.
        seed: of the batches and of the noise.
        at_once: images of one forward, for the memory; None takes a batch at once.
        journal: keeps each part of each batch that is done, for the next try; None keeps nothing.
        on_passes: called with the number of forwards and backwards over all images so far, as this process knows it.

    Raises:
        UserError: for a number out of range.
    """
    plan = plan or SharpnessPlan()
    plan.check(objective.samples)
    kept = Journal() if journal is None else journal
    made = {"forward": 0.0, "backward": 0.0}
    measures: list[Measure] = []
    left_out: dict[int, int] = {}
    for size, units in _units(plan, seed):
        dealt = deal(objective, size, seed, at_once)
        left_out[size] = dealt.left_out
        for unit in units:
            rows = _rows(objective, dealt, f"{unit.name} {size}", unit, kept, made)
            for (part, about), values in zip(unit.labels, zip(*rows, strict=True), strict=True):
                measures.append(_summary(part, about, values))
            if on_passes:
                on_passes(round(made["forward"] + made["backward"]))
    return Sharpness(measures, left_out, made)


def _rows(
    objective: Objective, dealt: Dealt, name: str, unit: _Unit, kept: Journal, made: dict[str, float]
) -> list[list[Value]]:
    """What each batch says, by batch. All ranks call this alike, and make the same moves."""
    world = objective.world
    for turn in range(dealt.most):
        world.move("measuring sharpness")
        found = None
        index = dealt.first + turn
        if turn < len(dealt.batches) and f"{name} {index}" not in kept:
            alone = objective.on(dealt.batches[turn])
            found = index, unit.measure(alone, index), alone.passes
        for each in world.gather(found):
            if each is not None:
                index, values, passes = each
                kept.put(f"{name} {index}", values)
                for kind, count in passes.items():
                    made[kind] += count / dealt.count
    return [kept[f"{name} {i}"] for i in range(dealt.count)]


def _units(plan: SharpnessPlan, seed: int) -> Iterator[tuple[int, list[_Unit]]]:
    """What to measure, by the size of the batches."""
    units = [_Unit("loss", [("loss", {}), ("grad_norm", {})], _loss)]
    if "one_step" in plan.parts:
        for adaptive, rhos in ((False, plan.rho), (True, plan.adaptive_rho)):
            measure = partial(_one_step, rhos, adaptive)
            units.append(_Unit(f"one_step {adaptive}", _labels("one_step", rhos, adaptive=adaptive), measure))
    if "auto_pgd" in plan.parts:
        balls = ("l2", False, plan.rho), ("l2", True, plan.adaptive_rho)
        boxes = ("linf", False, plan.linf_rho), ("linf", True, plan.adaptive_linf_rho)
        for norm, adaptive, rhos in (*balls, *boxes):
            for rho in rhos:
                labels = _labels("auto_pgd", [rho], norm=norm, adaptive=adaptive)
                measure = partial(_auto_pgd, rho, norm, adaptive, plan.steps)
                units.append(_Unit(f"auto_pgd {norm} {adaptive} {rho}", labels, measure))
    if "average" in plan.parts:
        for adaptive, stds in ((False, plan.std), (True, plan.adaptive_std)):
            measure = partial(_average, stds, adaptive, plan.draws, seed)
            units.append(_Unit(f"average {adaptive}", _labels("average", stds, adaptive=adaptive), measure))
    if "radius" in plan.parts:
        kinds = ("first_order", "rise", "gradient", *(["random"] if plan.directions else []))
        named = [("radius", {"kind": kind, "sigma": sigma}) for kind in kinds for sigma in sorted(plan.sigma)]
        units.append(_Unit("radius", named, partial(_radius, plan, seed)))
    units = [unit for unit in units if unit.labels]
    if len(units) > 1:
        yield plan.batch_size, units
    if "m_sharpness" in plan.parts and plan.rho:
        for m in plan.m_sizes:
            yield m, [_Unit("m_sharpness", _labels("m_sharpness", plan.rho, m=m), partial(_one_step, plan.rho, False))]


def _labels(part: str, rhos: Sequence[float], **about: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(part, {**about, "rho": rho}) for rho in rhos]


def _loss(alone: Objective, _: int) -> list[Value]:
    loss, gradient = alone.gradient()
    return [[loss], [float(gradient.norm())]]


def _one_step(rhos: Sequence[float], adaptive: bool, alone: Objective, _: int) -> list[Value]:
    return [[rise] for rise in one_step(alone, rhos, adaptive=adaptive)]


def _auto_pgd(rho: float, norm: str, adaptive: bool, steps: int, alone: Objective, _: int) -> list[Value]:
    return [[auto_pgd(alone, rho, norm=norm, adaptive=adaptive, steps=steps)]]


def _average(stds: Sequence[float], adaptive: bool, draws: int, seed: int, alone: Objective, index: int) -> list[Value]:
    found = average_rise(alone, stds, draws=draws, seed=seed, first=index * draws, adaptive=adaptive)
    return [[rise] for rise in found]


def _radius(plan: SharpnessPlan, seed: int, alone: Objective, index: int) -> list[Value]:
    budgets = sorted(plan.sigma)
    loss, gradient = alone.gradient()
    length = float(gradient.norm())
    first: list[float | None] = [sigma / length if length else None for sigma in budgets]
    rises: list[float | None] = [None] * len(budgets)
    along = rises
    if length:
        rises = list(one_step(alone, [sigma / length for sigma in budgets]))
    start = first[0] or plan.max_radius / 1024
    go = partial(radii, alone, budgets=budgets, loss=loss, start=start, maximum=plan.max_radius)
    if length:
        along = go(gradient)
    numbers = range(index * plan.directions, (index + 1) * plan.directions)
    rays = [go(normal(alone.size, gradient, seed, "ray", i)) for i in numbers]
    return [[each] for each in (*first, *rises, *along)] + [list(each) for each in zip(*rays, strict=True)]


def _summary(part: str, about: dict[str, Any], values: Sequence[Value]) -> Measure:
    said = [[each for each in value if each is not None and math.isfinite(each)] for value in values]
    means = [statistics.fmean(each) for each in said if each]
    missing = sum(map(len, values)) - sum(map(len, said))
    return Measure(part, about, mean_with_error(means) if means else None, missing)
