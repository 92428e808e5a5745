"""What the seeds show: means with their standard deviation, and differences that hold up against it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lesam_dist.experiments.runs import paired_difference

LEVEL = 0.95
"""Of the intervals of all pairs of groups together."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over ``n`` seeds; nan for the deviation of one."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of finite values, at least one."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))

    @property
    def low(self) -> float | None:
        """One standard deviation below the mean; None for one seed."""
        return None if math.isnan(self.std) else self.mean - self.std

    @property
    def high(self) -> float | None:
        """One above it."""
        return None if math.isnan(self.std) else self.mean + self.std


@dataclass(frozen=True)
class Difference:
    """Of two groups, first minus second.

    Attributes:
        mean: of the differences.
        error: standard error; nan where there are too few seeds for one.
        low, high: of an interval that holds, with those of all pairs, at `LEVEL`; nan where there is none.
        n: seeds of the smaller group, or of both where they share them.
        paired: by seed.
    """

    mean: float
    error: float
    low: float
    high: float
    n: int
    paired: bool

    @property
    def is_shown(self) -> bool:
        """Whether the seeds show that it is not zero. Equal differences of all seeds show nothing: accuracies are whole
        numbers of images, so few seeds may agree by chance, and then there is no spread to judge by."""
        return self.error > 0 and (self.low > 0 or self.high < 0)


def difference(first: dict[int, float], second: dict[int, float], pairs: int) -> Difference:
    """Of two groups' values by seed: paired where they have the same seeds (Student's t), else Welch's.

    Args:
        first, second: values by seed, at least one each.
        pairs: of groups that are compared at once, by which Bonferroni's correction divides.
    """
    from scipy import stats

    level = 1 - (1 - LEVEL) / max(pairs, 1)
    paired = first.keys() == second.keys()
    a, b = (
        (list(first.values()), [second[seed] for seed in first])
        if paired
        else map(list, (first.values(), second.values()))
    )
    n = min(len(a), len(b))
    mean, error = statistics.fmean(a) - statistics.fmean(b), math.nan
    low = high = math.nan
    if n > 1:
        if paired:
            mean, error = paired_difference(a, b)
        else:
            error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        if error > 0:
            test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
            interval = test.confidence_interval(level)
            low, high = float(interval.low), float(interval.high)
    return Difference(mean, error, low, high, n, paired)
