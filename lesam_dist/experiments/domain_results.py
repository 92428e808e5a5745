"""What runs of `lesam-dist domains` came to on the domains that they were not trained on, and its tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lesam_dist.experiments.report import plus_minus
from lesam_dist.experiments.runs import Outcome

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Header and rows."""

NOTE = (
    "Top-1 in per cent on the domains that a run was not trained on, mean and standard deviation over seeds. A column "
    "is a SOURCE domain: the mean over the others, each counting the same; mean: of these columns. all images: each "
    "image of the others counts the same. All are of the epoch that was best on the source's held-out images, or with "
    "SWAD of the last, and of the averaged weights where the run has some; last epoch: the mean after that instead. "
    "Below: every pair."
)


@dataclass(frozen=True)
class Tested:
    """What a run came to.

    Attributes:
        accuracy: of each target domain, top-1 in per cent, at the epoch that was best on the source's held-out images;
            after the last one where none were held out, and of SWAD.
        macro: mean of these.
        micro: of all their images together.
        last: ``macro`` after the last epoch.
        epoch: that was best.
    """

    accuracy: dict[str, float]
    macro: float
    micro: float
    last: float
    epoch: int


Runs = Mapping[tuple[str, str], Sequence[Tested | None]]
"""By source domain and method, and then by seed; None where a run diverged."""


def outcome_on_targets(run_dir: Path, *, chooses: bool = True) -> Tested:
    """What a finished run's log says, of its averaged weights where it has some.

    Args:
        run_dir: of the run.
        chooses: take the epoch that was best on held-out images. False takes the last, as of SWAD, whose average has
            chosen among all steps by then.
    """
    from lesam_dist.train.telemetry import read_metrics  # which needs torch

    lines = [line for line in read_metrics(run_dir) if line.get("split") == "val"]
    last = lines[-1]
    prefix = "ema_" if "ema_target_acc1" in last else ""
    chosen = chooses and f"{prefix}acc1" in last
    best = max(lines, key=lambda line: line[f"{prefix}acc1"]) if chosen else last
    start, macro = f"{prefix}acc1_", f"{prefix}target_acc1"
    accuracy = {name.removeprefix(start): value for name, value in best.items() if name.startswith(start)}
    return Tested(accuracy, best[macro], best[f"{macro}_micro"], last[macro], int(best["epoch"]))


def over_sources(tested: Runs, method: str, field: str = "macro") -> list[float]:
    """The mean over the source domains, by seed; nan where a run diverged."""
    values = [_values(runs, field) for (_, name), runs in tested.items() if name == method]
    return [statistics.fmean(of_seed) for of_seed in zip(*values, strict=True)]


def as_outcome(name: str, values: Sequence[float], cost: float) -> Outcome:
    """Of runs whose epoch has been chosen already."""
    return Outcome(name, list(values), list(values), cost)


def by_source(tested: Runs, outcomes: Sequence[Outcome]) -> Table:
    """The paper's table, with more columns; ``outcomes`` are the methods'."""
    sources = list(dict.fromkeys(source for source, _ in tested))
    rows = []
    for outcome in outcomes:
        columns = [_values(tested[source, outcome.name], "macro") for source in sources]
        columns += [outcome.values, *(over_sources(tested, outcome.name, field) for field in ("micro", "last"))]
        rows.append((outcome.name, *map(_shown, columns), f"{outcome.cost:.2f}"))
    return ("method", *sources, "mean", "all images", "last epoch", "cost (SGD steps)"), rows


def pairs(tested: Runs) -> Table:
    """Every source domain with every target, and the epochs that were best."""
    finished = [run for runs in tested.values() for run in runs if run is not None]
    targets = sorted({name for run in finished for name in run.accuracy})
    rows = []
    for (source, method), runs in tested.items():
        of_targets = [[math.nan if run is None else run.accuracy.get(name) for run in runs] for name in targets]
        cells = ["" if None in values else _shown([v for v in values if v is not None]) for values in of_targets]
        epochs = ", ".join("-" if run is None else str(run.epoch) for run in runs)
        rows.append((source, method, *cells, epochs))
    return ("source", "method", *(f"on {name}" for name in targets), "best epochs"), rows


def numbers(tested: Runs) -> dict[str, Any]:
    """All of it for JSON, by ``SOURCE/METHOD``."""
    return {
        f"{source}/{name}": [None if run is None else asdict(run) for run in runs]
        for (source, name), runs in tested.items()
    }


def _values(runs: Sequence[Tested | None], field: str) -> list[float]:
    return [math.nan if run is None else float(getattr(run, field)) for run in runs]


def _shown(values: Sequence[float]) -> str:
    outcome = as_outcome("", values, 0.0)
    return plus_minus(outcome.mean, outcome.std)
