"""How two numbers of the same runs go together, by ranks, and where that comes from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy.stats import kendalltau, t

Run = tuple[str, int]
"""Method and seed."""


class Mean(NamedTuple):
    """A mean, its standard error, and of how many; nan of none, and the error of one."""

    value: float
    error: float
    count: int

    def is_shown(self, level: float = 0.05) -> bool:
        """Whether a two-sided t-test tells it from zero."""
        if not (math.isfinite(self.error) and self.error > 0):  # two seeds that agree show nothing
            return False
        return abs(self.value) > float(t.ppf(1 - level / 2, self.count - 1)) * self.error


class Correlations(NamedTuple):
    """Kendall's tau-b of two numbers over runs.

    Attributes:
        overall: over all runs; they share seeds, so they are fewer than they seem.
        within_seeds: over the methods of each seed: what a choice of method does.
        within_methods: over the seeds of each method: what chance does.
    """

    overall: float
    within_seeds: Mean
    within_methods: Mean


def correlations(first: Mapping[Run, float], second: Mapping[Run, float]) -> Correlations:
    """Of the runs that have both; a group in which one of the two never varies has no tau and is left out."""
    runs = [run for run in first if run in second and math.isfinite(first[run]) and math.isfinite(second[run])]

    def tau(chosen: Sequence[Run]) -> float:
        return float(kendalltau([first[run] for run in chosen], [second[run] for run in chosen]).statistic)

    def within(index: int) -> Mean:
        return mean_of(
            tau([run for run in runs if run[index] == each]) for each in dict.fromkeys(r[index] for r in runs)
        )

    return Correlations(tau(runs), within(1), within(0))


def mean_of(values: Iterable[float]) -> Mean:
    """Of the finite ones."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return Mean(math.nan, math.nan, 0)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return Mean(statistics.fmean(found), error, len(found))
