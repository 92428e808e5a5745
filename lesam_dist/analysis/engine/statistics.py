"""A mean, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """The mean of some draws and its standard error; None for a single draw, or where a draw is not finite."""

    mean: float
    standard_error: float | None
    draws: int


def mean_with_error(draws: Sequence[float]) -> Estimate:
    """Of independent draws, at least one."""
    several = len(draws) > 1 and all(map(math.isfinite, draws))
    error = statistics.stdev(draws) / math.sqrt(len(draws)) if several else None
    return Estimate(statistics.fmean(draws), error, len(draws))
