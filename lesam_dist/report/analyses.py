"""What `lesam-dist analyze` found of the runs' checkpoints: for each analysis a table, and its charts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lesam_dist.analysis.command import ANALYSES
from lesam_dist.analysis.commands.labels import labels
from lesam_dist.report.analysis_charts import CHARTS
from lesam_dist.report.blocks import DASHES, Section, Style, Table, Text, sentence
from lesam_dist.report.interactive import figure
from lesam_dist.report.reading import Document, Run, printable
from lesam_dist.report.results import Result

_TITLES = {
    "hessian": "Spectrum of the Hessian",
    "sharpness": "Sharpness",
    "lpf": "Low-pass filtered loss",
    "landscape": "Loss landscape",
    "connect": "Between two checkpoints",
    "robustness": "Robustness and calibration",
}
_NOT_TO_COMPARE = ("weights",)  # of the settings: what each document is of
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class Entry:
    """A document of an analysis.

    Attributes:
        name: of its checkpoint, or of its file where it has several.
        style: of its group, with a dash of its own.
        document: as the analysis wrote it.
        names, styles: of each of its checkpoints.
    """

    name: str
    style: Style
    document: Document
    names: list[str]
    styles: list[Style]


def analyses(results: Sequence[Result]) -> list[Section]:
    """A section for each analysis that there is something of. What is not understood is said to be left out."""
    found = _entries(results)
    return [_section(name, found[name]) for name in ANALYSES if name in found]


def _entries(results: Sequence[Result]) -> dict[str, list[Entry]]:
    owners = _owners(results)
    found: dict[str, list[Entry]] = {}
    used: Counter[tuple[str, str]] = Counter()  # dashes, of an analysis and a colour
    for result in results:
        for run in result.group.runs:
            for file, document in run.documents.items():
                kind = document["analysis"]
                if kind not in _TITLES:
                    continue
                colour = result.group.style.colour
                style = Style(colour, DASHES[used[kind, colour] % len(DASHES)])
                used[kind, colour] += 1
                found.setdefault(kind, []).append(_entry(file, document, style, run, result, owners))
    return found


def _entry(
    file: str, document: Document, style: Style, run: Run, result: Result, owners: dict[str, tuple[str, Style]]
) -> Entry:
    if "checkpoints" not in document:
        name = _name(result, run, document)
        return Entry(name, style, document, [name], [style])
    try:
        digests, known, dims = document["settings"]["weights"], labels(document), document["settings"].get("dims")
        found = [owners.get(str(d), (printable(one), style)) for d, one in zip(digests, known, strict=True)]
        shown = [
            {**one, "run": "", "checkpoint": name}
            for one, (name, _) in zip(document["checkpoints"], found, strict=True)
        ]
    except _MALFORMED:
        return Entry(file, style, {}, [], [])
    used: Counter[str] = Counter()
    styles = []
    for _, base in found:
        styles.append(Style(base.colour, DASHES[used[base.colour] % len(DASHES)]))
        used[base.colour] += 1
    names = [name for name, _ in found]
    title = " and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
    title += f", {dims}d" if dims else ""
    return Entry(title, style, {**document, "checkpoints": shown}, names, styles)


def _owners(results: Sequence[Result]) -> dict[str, tuple[str, Style]]:
    """Names and styles of checkpoints by the digest of their weights, as analyses of one checkpoint have it.

    A document about several runs has but the names of their folders, which may all be seed_0.
    """
    found = {}
    for result in results:
        for run in result.group.runs:
            for document in run.documents.values():
                digest: Any = document.get("settings")
                digest = digest.get("weights") if isinstance(digest, dict) else None
                if isinstance(digest, str) and "checkpoint" in document:
                    found[digest] = _name(result, run, document), result.group.style
    return found


def _name(result: Result, run: Run, document: Document) -> str:
    """A checkpoint by its group; with its seed where there are several, and its own name where it is not the only one
    of its run.
    """
    name = result.name if len(result.group.runs) == 1 else f"{result.name} seed {run.seed}"
    several = len({str(one["checkpoint"]) for one in run.documents.values() if "checkpoint" in one}) > 1
    return f"{name}, {printable(str(document.get('checkpoint', '')))}" if several else name


def _section(kind: str, entries: Sequence[Entry]) -> Section:
    section = Section(f"analysis-{kind}", _TITLES[kind], [Text(f"{sentence(ANALYSES[kind])}.")])
    readable: list[Entry] = []
    table: dict[str, dict[int, str]] = {}
    for entry in entries:
        rows = _rows(kind, entry)
        if rows is None:
            section.blocks.append(Text(f"A document about {entry.name} is not of this version, and is left out."))
            continue
        for name, value in rows:
            table.setdefault(name, {})[len(readable)] = value.replace("   ", "\n")
        readable.append(entry)
    if not readable:
        return section
    if differ := _settings_that_differ(readable):
        section.blocks.append(Text(f"Not made with the same settings, so not to be compared: {differ}."))
    section.blocks.extend(CHARTS[kind](readable))
    cells = [[name, *(values.get(i, "-") for i in range(len(readable)))] for name, values in table.items()]
    section.blocks.append(Table(["", *(entry.name for entry in readable)], cells, kind="values"))
    return section


def _rows(kind: str, entry: Entry) -> list[tuple[str, str]] | None:
    """What the analysis shows on a terminal; None where that, or a chart, cannot be made of the document."""
    try:
        for chart in CHARTS[kind]([entry]):
            json.dumps(figure(chart), allow_nan=False)
        rows: list[tuple[str, str]] = import_module(f"lesam_dist.analysis.commands.{kind}").ANALYSIS.rows(
            entry.document
        )
    except _MALFORMED:
        return None
    return rows


def _settings_that_differ(entries: Sequence[Entry]) -> str:
    """Of documents that are shown in one chart: lines and planes are not."""
    different: dict[str, None] = {}
    for dims in (None, 1, 2):
        known = [entry.document.get("settings") for entry in entries]
        settings = [each for each in known if isinstance(each, dict) and each.get("dims") == dims]
        names = dict.fromkeys(name for each in settings for name in each if name not in _NOT_TO_COMPARE)
        different |= {name: None for name in names if any(each.get(name) != settings[0].get(name) for each in settings)}
    return ", ".join(different)
