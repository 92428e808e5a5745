"""The best epoch of a run, told beside its last one: wrong labels, for one, are memorised late, at a cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lesam_dist.tasks.task import Metric
from lesam_dist.train.telemetry import read_metrics


class Best(NamedTuple):
    """The best of a run's evaluations, as the metric has it, and after how many epochs it was: the first of several."""

    value: float
    epoch: float


def best_evaluation(run_dir: Path, metric: Metric) -> Best | None:
    """Of what the log has: what a run left behind when it was resumed, or went back, is not in it.

    It is chosen by the samples that it is measured on, and so flatters. None where no evaluation is finite, or there is
    no log.
    """
    with suppress(OSError):
        return best_of(read_metrics(run_dir), metric)
    return None


def best_of(lines: Iterable[Mapping[str, Any]], metric: Metric) -> Best | None:
    """The same, of the lines of a log."""
    found: list[Best] = []
    for line in lines:
        value, epoch = _number(line.get(metric.name)), _number(line.get("epoch"))
        if line["split"] == "val" and value is not None and epoch is not None:
            found.append(Best(value, epoch))
    sign = -1 if metric.higher_is_better else 1
    return min(found, key=lambda each: (sign * each.value, each.epoch), default=None)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
