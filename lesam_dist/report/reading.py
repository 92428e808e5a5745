"""What a run has left in its folder: config, log, checkpoints, analyses, and how far it came."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.report.paths import CONFIG
from lesam_dist.tasks.classification.task import ACC1
from lesam_dist.tasks.task import Metric
from lesam_dist.train.checkpoint.folder import Folder
from lesam_dist.train.run_lock import Holder
from lesam_dist.train.telemetry import METRICS, read_metrics

_LOCK = ".lock"
Document = dict[str, Any]


@dataclass(frozen=True)
class State:
    """How far a run came.

    Attributes:
        finished: it has made all its epochs.
        text: in words.
    """

    finished: bool
    text: str


@dataclass(frozen=True)
class Run:
    """A run, as its folder has it.

    Attributes:
        path: of the folder.
        name: the shortest end of the path that tells the runs of a page apart, in printable characters.
        config: of the run.
        values: the same, flat.
        lines: of its log.
        unreadable: lines of the log that are left out, as one that was cut off in writing.
        checkpoints: manifests by name, newest first; None for one that is not whole.
        documents: of analyses, by the name of their file.
        left_out: a line for each file that was not understood.
        holder: who had the folder last; None where nothing says so.
        state: how far it came.
        metric: what it is compared by, as its checkpoints say.
    """

    path: Path
    name: str
    config: Config
    values: dict[str, Any]
    lines: list[dict[str, Any]]
    unreadable: int
    checkpoints: dict[str, dict[str, Any] | None]
    documents: dict[str, Document]
    left_out: list[str]
    holder: Holder | None
    state: State
    metric: Metric

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.seed

    def of(self, split: str, key: str) -> list[tuple[dict[str, Any], float | None]]:
        """The lines of a split that have a key, with its value; None where that is not finite."""
        lines = (line for line in self.lines if line["split"] == split and key in line)
        return [(line, number(line[key])) for line in lines]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each run.

    Raises:
        UserError: one has no config that this version understands, or has logged nothing; they are not compared by the
            same metric.
    """
    runs = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    for run in runs:
        if run.metric != runs[0].metric:
            raise UserError(
                f"'{runs[0].path}' is compared by {runs[0].metric.label} and '{run.path}' by {run.metric.label}: make "
                "a report of each."
            )
    return runs


def printable(text: str) -> str:
    """The text without characters that XML and HTML cannot have, and in one line."""
    text = text.encode(errors="replace").decode()
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _read(path: Path, name: str) -> Run:
    config = _config(path / CONFIG)
    metrics = path / METRICS
    if not metrics.is_file():
        raise UserError(f"'{path}' has no {METRICS}: the run logged nothing before it ended, or has just begun.")
    try:
        there = sum(map(bool, metrics.read_text(errors="replace").split("\n")))  # first: a run may be adding lines
        lines = [line for line in read_metrics(path) if number(line.get("epoch")) is not None]
        unreadable = max(0, there - len(lines))
    except OSError as error:
        raise UserError(f"'{metrics}' cannot be read: {error.strerror or error}.") from error
    if not lines:
        raise UserError(f"'{metrics}' has no line of a step or an evaluation: there is nothing to report yet.")
    folder = Folder(path / "checkpoints")
    checkpoints = {one: folder.content(one) for one in folder.names()}
    documents, left_out = _documents(path / "analysis")
    holder = Holder.read(path / _LOCK)
    state = _state(config, lines, holder, metrics)
    values, metric = flatten(config), _metric(checkpoints.values())
    return Run(path, name, config, values, lines, unreadable, checkpoints, documents, left_out, holder, state, metric)


def _metric(checkpoints: Iterable[dict[str, Any] | None]) -> Metric:
    """Top-1, where no checkpoint says: version 0.1 had nothing else."""
    for content in checkpoints:
        with suppress(TypeError):  # of another version
            if content and isinstance(content.get("metric"), dict):
                return Metric(**content["metric"])
    return ACC1


def _config(file: Path) -> Config:
    try:
        return parse(["--config", file.read_text(encoding="utf-8") + "\n"])
    except (UserError, OSError, ValueError) as error:
        raise UserError(f"'{file}' is not a config of this version: {error}") from error


def _documents(folder: Path) -> tuple[dict[str, Document], list[str]]:
    found: dict[str, Document] = {}
    left_out = []
    for file in sorted(folder.glob("[!.]*.json")):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            document = None
        if isinstance(document, dict) and isinstance(document.get("analysis"), str) and "results" in document:
            found[printable(file.stem)] = document
        else:
            left_out.append(f"analysis/{printable(file.name)} is not of an analysis, or not whole: left out.")
    return found, left_out


def _state(config: Config, lines: Sequence[dict[str, Any]], holder: Holder | None, metrics: Path) -> State:
    done = max(line["epoch"] for line in lines)
    evaluated = any(line["split"] == "val" and line["epoch"] >= config.epochs for line in lines)
    how_far = f"{done:.4g} of {config.epochs} epochs"
    if number(lines[-1].get("loss")) is None:
        return State(False, f"diverged after {how_far}")
    if evaluated:
        return State(True, f"finished, {config.epochs} epochs")
    if holder is not None and holder.is_here and not holder.is_gone and holder.pid != os.getpid():
        return State(False, f"still in progress, {how_far}")
    last = datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc)
    return State(False, f"not finished, {how_far}; last line of {last:%Y-%m-%d %H:%M} UTC")


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return list(map(printable, names))


def notes(runs: Iterable[Run]) -> list[str]:
    """What a reader should know before the numbers: a line for each thing that is not as it should be."""
    found = []
    for run in runs:
        if not run.state.finished:
            found.append(f"{run.name}: {run.state.text}.")
        if run.unreadable:
            many = "1 line" if run.unreadable == 1 else f"{run.unreadable} lines"
            found.append(f"{run.name}: left out {many} of {METRICS} that could not be read, as one that was cut off.")
        found += [f"{run.name}: {line}" for line in run.left_out]
    return found
