"""What was run, and on what: differences of configs, commands, state, checkpoints, dates and versions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesam_dist.analysis.commands.labels import number
from lesam_dist.config.command_line import parse
from lesam_dist.config.methods import shown
from lesam_dist.config.values import flatten
from lesam_dist.report.blocks import Section, Table, Text
from lesam_dist.report.grouping import changed, differing, nearest_recipe
from lesam_dist.report.paths import CONFIG
from lesam_dist.report.reading import Run, printable
from lesam_dist.report.results import Result, best, last
from lesam_dist.tasks.task import Metric

_METHOD, _ARGS = "optimizer.name", "optimizer.args."


def runs_section(results: Sequence[Result], paths: Sequence[Path]) -> Section:
    """Each run with its state and results; what sets the groups apart, or one group from its recipe; commands."""
    section = Section("runs", "What was run")
    rows, styles = [], []
    for result in results:
        for run in result.group.runs:
            top = best(run)
            rows.append(
                [
                    run.name,
                    result.name,
                    str(run.seed),
                    run.state.text,
                    _value(last(run, run.metric.name), run.metric),
                    "-" if top is None else f"{_value(top[0], run.metric)} (epoch {top[1]:g})",
                    number(last(run, "loss")) if run.of("val", "loss") else "-",
                    _checkpoint(run),
                ]
            )
            styles.append(result.group.style)
    label = results[0].metric.label
    header = ("run", "method", "seed", "state", f"{label}, last", f"{label}, best", "loss, last", "latest checkpoint")
    section.blocks.append(Table(header, rows, "", styles, kind="words"))
    section.blocks.extend(_configs(results))
    section.blocks.extend(_commands(results, paths))
    return section


def environment(results: Sequence[Result]) -> Section:
    """Where and with what each run was made, as far as its files say so."""
    rows, styles = [], []
    for result in results:
        for run in result.group.runs:
            saved = next((content for content in run.checkpoints.values() if content), {})
            config = run.config
            rows.append(
                [
                    run.name,
                    str(saved.get("torch", "-")),
                    str(saved.get("world_size", "-")),
                    f"{config.parallel.device or 'not set'}, {config.parallel.strategy}",
                    f"{config.precision.compute}, weights {config.precision.weights}",
                    run.holder.host if run.holder else "-",
                    _date(run.holder.since) if run.holder else "-",
                    _date(str(saved.get("saved", "-"))),
                ]
            )
            styles.append(result.group.style)
    header = ("run", "torch", "processes", "device, strategy", "precision", "host", "last started", "last saved")
    note = "torch, processes and dates as the latest whole checkpoint and the run's lock have them; - is not recorded."
    section = Section("environment", "Environment", [Table(header, rows, note, styles, kind="words")])
    if analyses := _analyses(results):
        of_analyses = ("analyses of", "lesam-dist", "torch", "python", "device")
        section.blocks.append(Table(of_analyses, analyses, "What the analyses were made with.", kind="words"))
    return section


def _configs(results: Sequence[Result]) -> list[Table | Text]:
    groups = [result.group for result in results]
    if len(groups) > 1:
        found = differing(groups)
        if _METHOD in found:  # each has arguments of its own
            found = {path: values for path, values in found.items() if not path.startswith(_ARGS)}
        rows = [[path, *("-" if value is None else shown(value) for value in values)] for path, values in found.items()]
        if _METHOD in found:
            rows.append([_ARGS.rstrip("."), *(_arguments(each.values) for each in groups)])
        note = "Fields of the configs that are not the same for all; what only says where things go is left out."
        return [Table(["field", *(result.name for result in results)], rows, note, kind="words")]
    values = groups[0].values
    recipe = nearest_recipe(values)
    rows = [
        [path, "-" if before is None else shown(before), shown(now)]
        for path, (before, now) in changed(values, flatten(parse(["--config", recipe]))).items()
    ]
    if not rows:
        return [Text(f"The config is that of the recipe {recipe}.")]
    note = f"Fields that are not as in the recipe that is nearest, {recipe}."
    return [Table(["field", recipe, groups[0].name], rows, note, kind="words")]


def _arguments(values: dict[str, Any]) -> str:
    own = [f"{path.removeprefix(_ARGS)} {shown(value)}" for path, value in values.items() if path.startswith(_ARGS)]
    return ", ".join(own) or "-"


def _commands(results: Sequence[Result], paths: Sequence[Path]) -> list[Text]:
    found = [command for path in paths if (command := _experiment(path))]
    if found:
        return [Text("The command, as far as its folder has it:"), *(Text(command, "code") for command in found)]
    run = results[0].group.runs[0]
    words = ["lesam-dist", "train", "--config", str(run.path / CONFIG), "--run_dir", "runs/again"]
    return [
        Text("A run does not keep its command line; this trains with the same config:"),
        Text(printable(shlex.join(words)), "code"),
    ]


def _experiment(path: Path) -> str | None:
    """The command of a comparison or a sweep, by what it wrote when it had finished."""
    name = "compare" if (path / "compare.json").is_file() else "sweep"
    try:
        document = json.loads((path / f"{name}.json").read_text(encoding="utf-8"))
        if name == "compare":
            own = ["--methods", ",".join(document["methods"])]
        else:
            values = ",".join(str(each["value"]) for each in document["values"])
            own = ["--field", document["field"], "--values", values]
        seeds = ["--seeds", str(document["seeds"])]
        return printable(
            shlex.join(["lesam-dist", name, "--config", document["config"], *own, *seeds, *document["flags"]])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _analyses(results: Sequence[Result]) -> list[list[str]]:
    """A row for each run and set of versions."""
    rows: list[list[str]] = []
    for result in results:
        for run in result.group.runs:
            for document in run.documents.values():
                versions: Any = document.get("versions")
                versions = versions if isinstance(versions, dict) else {}
                cells = [str(versions.get(name, "-")) for name in ("lesam_dist", "torch", "python")]
                row = [run.name, *cells, str(document.get("device", "-"))]
                rows += [] if row in rows else [row]
    return rows


def _checkpoint(run: Run) -> str:
    names = list(run.checkpoints)
    if not names:
        return "none"
    content = run.checkpoints[names[0]]
    if content is None:
        return f"{names[0]}, not whole"
    return f"{names[0]}" + ("" if content.get("finite") is True else ", not finite")


def _date(text: str) -> str:
    return text.replace("T", " ").replace("+00:00", " UTC")


def _value(value: float | None, metric: Metric) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} {metric.unit}" if metric.unit else number(value)
