"""What can be checked before anything is read: packages, the folders of runs, the file to write. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lesam_dist.errors import UserError

NAME = "report.html"
CONFIG = "config.yaml"  # as `lesam_dist.train.run_dir` has it, which imports torch
EXTRA = {"jinja2": "jinja2", "plotly": "plotly"}
"""Modules, and their packages in the extra "report"."""


def check_packages() -> None:
    """Raise a UserError that names what of the extra "report" is not installed."""
    if missing := [package for module, package in EXTRA.items() if find_spec(module) is None]:
        what = f"packages that are not installed ({', '.join(missing)})"
        raise UserError(f'lesam-dist report needs {what}: pip install "lesam-dist[report]"')


def target_of(paths: Sequence[Path], output: Path | None, *, force: bool) -> Path:
    """The file to write.

    Raises:
        UserError: it is there and ``force`` is not set, is a folder, or its folder is not there.
    """
    target = output or (paths[0] / NAME if len(paths) == 1 else Path(NAME))
    if target.is_dir():
        raise UserError(f"--output is '{target}', a folder: name a file, as {target / NAME}.")
    if not target.parent.is_dir():
        raise UserError(f"the folder of '{target}' does not exist: make it, or choose another --output.")
    if target.exists() and not force:
        raise UserError(f"'{target}' exists, and is not overwritten: choose another --output, or give --force.")
    return target


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs; of a comparison or a sweep, those of all its settings and seeds.

    Raises:
        UserError: no run there, or the same one twice.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(one.parent for one in path.glob(f"*/seed_*/{CONFIG}")) if path.is_dir() else []
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"'{path}' {what}: name the folder of a run, as runs/digits.")
        if not (path / CONFIG).is_file() and not inside:
            raise UserError(f"'{path}' has no {CONFIG}: name the folder of a run, of a comparison or of a sweep.")
        found += [path] if (path / CONFIG).is_file() else inside
    for index, path in enumerate(found):
        if path.resolve() in [other.resolve() for other in found[:index]]:
            raise UserError(f"'{path}' is there twice: name each run once.")
    return found
