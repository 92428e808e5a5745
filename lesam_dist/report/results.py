"""What came out of each run: its last and its best epoch, and the same over the seeds of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lesam_dist.experiments.cost import sgd_steps
from lesam_dist.report.grouping import Group
from lesam_dist.report.reading import Run
from lesam_dist.report.statistics import Difference, Spread, difference
from lesam_dist.tasks.task import Metric
from lesam_dist.train.best import Best, best_of


def last(run: Run, key: str) -> float | None:
    """A value of the last evaluation; None where it has none that is finite."""
    found = run.of("val", key)
    return found[-1][1] if found else None


def best(run: Run) -> Best | None:
    """The best value of the metric in all evaluations, and its epoch: the first where several are as good."""
    return best_of(run.lines, run.metric)


def steps(run: Run) -> int:
    """Updates that the run has made, as far as its log says."""
    return max(int(line["step"]) for line in run.lines)


@dataclass(frozen=True)
class Result:
    """Of a group: only its finished runs count."""

    group: Group

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    @property
    def metric(self) -> Metric:
        """What it is compared by."""
        return self.group.runs[0].metric

    @cached_property
    def cost(self) -> float:
        """Of an average step, in forward and backward passes over the batch; SGD makes one."""
        return sgd_steps(self.group.runs[0].config)

    @cached_property
    def by_seed(self) -> dict[int, float]:
        """The metric after the last epoch, by seed."""
        found = {run.seed: last(run, self.metric.name) for run in self.group.finished}
        return {seed: value for seed, value in found.items() if value is not None}

    def last(self, key: str | None = None) -> Spread | None:
        """Of a key, or of the metric, after the last epoch."""
        return _spread([last(run, key or self.metric.name) for run in self.group.finished])

    def best(self) -> Spread | None:
        """The metric of each run's best epoch, which flatters: it is chosen by the images that it is measured on."""
        return _spread([found[0] if (found := best(run)) else None for run in self.group.finished])

    def best_epoch(self) -> Spread | None:
        """When that was."""
        return _spread([found[1] if (found := best(run)) else None for run in self.group.finished])

    def total_cost(self) -> float | None:
        """Of a whole run, in steps of SGD."""
        finished = self.group.finished
        return self.cost * steps(finished[0]) if finished else None


def compare(results: Sequence[Result]) -> dict[tuple[str, str], Difference]:
    """First minus second metric, of each pair of groups with results, best mean first."""
    ranked = rank(results)
    pairs = [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
    return {(a.name, b.name): difference(a.by_seed, b.by_seed, len(pairs)) for a, b in pairs}


def rank(results: Sequence[Result]) -> list[Result]:
    """Those that have results, best mean first."""
    known = [(found.mean, result) for result in results if (found := result.last())]
    return [r for _, r in sorted(known, key=lambda pair: -pair[0] if pair[1].metric.higher_is_better else pair[0])]


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
