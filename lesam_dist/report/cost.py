"""What the runs took: passes, images a second, and where a step's time went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from lesam_dist.analysis.commands.labels import number
from lesam_dist.report.blocks import Section, Table
from lesam_dist.report.reading import Run
from lesam_dist.report.results import Result, steps
from lesam_dist.report.statistics import Spread
from lesam_dist.report.summary import plain
from lesam_dist.train.meter import SHARE
from lesam_dist.train.phases import COMMUNICATION, DATA, DRAW, OPTIMIZER, PASS_1, PASS_2

_PHASES = {
    DATA: "waiting for data",
    SHARE + DRAW: "attack on the images",
    SHARE + PASS_1: "pass 1",
    SHARE + PASS_2: "pass 2",
    SHARE + OPTIMIZER: "optimizer",
    SHARE + COMMUNICATION: "communication",
}
_NOTE = (
    "Cost of a step: its forward and backward passes, counted, where SGD makes one; a forward pass alone is a third. "
    "Images a second: the median over the logged steps, mean ± standard deviation over runs. Training time: all steps "
    "at that speed, without evaluations, checkpoints and the start. Times are of the machine that a run was on."
)


def cost(results: Sequence[Result]) -> Section:
    """The section."""
    section = Section("cost", "Cost and speed")
    styles = [result.group.style for result in results]
    rows = []
    for result in results:
        speeds = [speed for run in result.group.runs if (speed := _median(run, "images_per_s"))]
        batch = result.group.runs[0].config.data.batch_size
        made = steps(result.group.runs[0])
        seconds = [made * batch / speed for speed in speeds]
        rows.append(
            [
                result.name,
                f"{result.cost:.2f}",
                f"{made:,}",
                f"{result.cost * made:,.0f}",
                plain(Spread.of(speeds)) if speeds else "-",
                _time(statistics.fmean(seconds)) if seconds else "-",
            ]
        )
    header = ("method", "cost of a step", "steps", "cost in SGD steps", "images/s", "training time")
    section.blocks.append(Table(header, rows, _NOTE, styles))
    phases = [phase for phase in _PHASES if any(run.of("train", phase) for r in results for run in r.group.runs)]
    if phases:
        note = "Share of a step's time, the mean over logged steps and runs; the rest is logging and what is between."
        shares = [[result.name, *_shares(result.group.runs, phases)] for result in results]
        section.blocks.append(Table(["method", *map(_PHASES.__getitem__, phases), "other"], shares, note, styles))
    return section


def _shares(runs: Sequence[Run], phases: Sequence[str]) -> list[str]:
    shares = []
    for phase in phases:
        known = [value for run in runs for _, value in run.of("train", phase) if value is not None]
        shares.append(statistics.fmean(known) if known else None)
    rest = 1 - sum(share or 0.0 for share in shares)
    return ["-" if share is None else f"{100 * share:.1f} %" for share in (*shares, rest)]


def _median(run: Run, key: str) -> float | None:
    known = [value for _, value in run.of("train", key) if value is not None]
    return statistics.median(known) if known else None


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
