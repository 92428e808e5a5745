"""From runs to the page: all sections, put into page.html."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lesam_dist import __version__
from lesam_dist.errors import UserError
from lesam_dist.report import interactive, pictures
from lesam_dist.report.blocks import Chart, Plane, Section
from lesam_dist.report.grouping import group
from lesam_dist.report.paths import check_packages, find_runs, target_of
from lesam_dist.report.reading import Run, notes, printable, read_runs
from lesam_dist.report.results import Result


def write_report(runs: Sequence[str | Path], output: str | Path | None = None, *, force: bool = False) -> Path:
    """Write the report of some runs.

    Args:
        runs: folders of runs, of comparisons or of sweeps.
        output: the HTML file; None: report.html, in the folder where there is one, else here.
        force: replace a file that is there.

    Returns:
        The file's path.

    Raises:
        UserError: no run there, one that cannot be read, or a file that may not be written.
    """
    check_packages()
    paths = [Path(run) for run in runs]
    found = find_runs(paths)
    target = target_of(paths, None if output is None else Path(output), force=force)
    _replace(target, render(read_runs(found), paths))
    return target


def render(runs: Sequence[Run], paths: Sequence[Path] = ()) -> str:
    """The page; ``paths`` are the folders that were named, some of which may be comparisons."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from lesam_dist.report.summary import summary

    results = [Result(each) for each in group(runs)]
    headline, first = summary(results)
    sections = [first, *_rest(results, paths)]
    templates = Environment(
        loader=PackageLoader("lesam_dist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.tests["chart"] = lambda block: isinstance(block, (Chart, Plane))
    templates.globals |= {
        "picture": lambda chart: pictures.data_uri(pictures.svg(chart)),
        "figure": interactive.figure,
    }
    when = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    values: dict[str, Any] = {
        "title": _title(runs, paths),
        "headline": headline,
        "notes": notes(runs),
        "sections": sections,
        "made": f"{when} by lesam-dist {__version__}, Python {platform.python_version()}",
        "plotly": interactive.script(),
    }
    return templates.get_template("page.html").render(values)


def _rest(results: Sequence[Result], paths: Sequence[Path]) -> list[Section]:
    from lesam_dist.report.analyses import analyses
    from lesam_dist.report.cost import cost
    from lesam_dist.report.curves import curves
    from lesam_dist.report.dynamics import dynamics
    from lesam_dist.report.setup import environment, runs_section

    radius = dynamics(results)
    return [
        curves(results),
        *([] if radius is None else [radius]),
        *analyses(results),
        cost(results),
        runs_section(results, paths),
        environment(results),
    ]


def _title(runs: Sequence[Run], paths: Sequence[Path]) -> str:
    named = paths or [run.path for run in runs]
    names = [printable(path.resolve().name) for path in named]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _replace(target: Path, text: str) -> None:
    """Write the file whole or not at all."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"'{target}' cannot be written: {error.strerror or error}.") from error
