"""The low-pass filtered loss: the mean loss under Gaussian noise on the weights (Bisla et al., 2022; Figure 3b)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.randomness import normal
from lesam_dist.analysis.engine.statistics import Estimate, mean_with_error
from lesam_dist.errors import UserError
from lesam_dist.train.randomness import LPF_NOISE


@dataclass(frozen=True)
class Lpf:
    """What `lpf` has found.

    Attributes:
        sigma: standard deviation of the noise on each weight.
        loss: L(w), without noise.
        lpf: the estimate of E L(w + n).
        losses: L(w + n) of each draw.
    """

    sigma: float
    loss: float
    lpf: Estimate
    losses: list[float]

    @property
    def difference(self) -> float:
        """LPF - L, what the noise adds; its standard error is that of ``lpf``."""
        return self.lpf.mean - self.loss

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"difference": self.difference}


def lpf(
    objective: Objective,
    *,
    sigma: float = 0.01,
    draws: int = 100,
    seed: int = 0,
    journal: Journal | None = None,
    on_draw: Callable[[int], None] | None = None,
) -> Lpf:
    """``(L * K)(w) = E L(w + n)`` with ``n ~ N(0, sigma^2 I)`` over all trainable weights, by Monte Carlo.

    The LPF measure of Bisla, Wang and Choromanska, "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep
    Learning Optimization Landscape" (AISTATS 2022), with their sigma and number of draws. It contains the loss, so L(w)
    is beside it. To second order the difference is ``sigma^2 tr(H) / 2``.

    The noise depends on ``seed`` and the draw alone: checkpoints, methods and numbers of processes see the same, and a
    difference between two of them has less error than the errors of both suggest. One forward for each draw, and one
    for L(w); the weights come back bit for bit. The standard error is that of the draws, for these images.

    Args:
        objective: the loss.
        sigma: standard deviation of the noise, in units of the weights.
        draws: of the noise.
        seed: of the noise.
        journal: keeps each draw that is done, for the next try; None keeps nothing.
        on_draw: called with the number of draws so far.

    Raises:
        UserError: for a number out of range.
    """
    check(sigma, draws)
    kept = Journal() if journal is None else journal  # an empty one is false
    weights = objective.weights()

    def drawn(index: int) -> float:
        with objective.at(weights + sigma * normal(objective.size, weights, seed, "lpf", index)):
            return objective.loss()

    loss: float = kept.get("loss", objective.loss)
    losses: list[float] = []
    for i in range(draws):
        losses.append(kept.get(f"draw {i}", lambda: drawn(i)))  # noqa: B023 (called at once)
        if on_draw:
            on_draw(i + 1)
    return Lpf(sigma, loss, mean_with_error(losses), losses)


def lpf_one_pass(objective: Objective, sigma: float = 0.01, seed: int = 0) -> float:
    """An unbiased estimate of the same from one forward over all images, with fresh noise for each batch.

    Bisla et al. have it too. For curves during training, where the same noise at all epochs makes them smooth. Noise
    depends on ``seed`` and on the batch's place among the batches of all ranks, rank 0's first. So the number depends
    on which images are in which batch, and on the number of processes only so far as that changes the batches.

    Raises:
        UserError: for a sigma out of range.
    """
    check(sigma)
    world = objective.world
    first = sum(world.gather(len(objective.batches))[: world.rank])
    weights = objective.weights()
    world.move("computing on its images")
    total = 0.0
    for index, batch in enumerate(objective.batches, first):
        alone = objective.on([batch])
        with alone.at(weights + sigma * normal(objective.size, weights, seed, LPF_NOISE, index)):
            total += alone.loss() * alone.samples
    objective.passes["forward"] += 1
    return float(sum(world.gather(total))) / objective.samples


def check(sigma: float, draws: int = 1) -> None:
    """Raise a `UserError` for a number that `lpf` cannot use."""
    if not 0 < sigma < math.inf:
        raise UserError(f"sigma is {sigma:g}: it must be above 0, as the standard deviation of noise on the weights.")
    if draws < 1:
        raise UserError(f"draws is {draws}: it must be at least 1.")
