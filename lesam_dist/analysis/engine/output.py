"""Where an analysis leaves its results: RUN_DIR/analysis/NAME-CHECKPOINT.json, .png and .svg."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lesam_dist import __version__
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.processes import Distributed

Document = dict[str, Any]


class Output:
    """The files of one analysis of one checkpoint.

    Args:
        folder: is made where something is written.
        stem: of the files' names.
        settings: what the results depend on: two documents with equal ones hold the same.
        world: this process among all; rank 0 writes.
        force: replace results of other settings.
    """

    def __init__(
        self, folder: Path, stem: str, settings: dict[str, Any], world: Distributed, *, force: bool = False
    ) -> None:
        self.folder, self.stem, self.world, self._force = folder, stem, world, force
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read

    def finished(self) -> Document | None:
        """The results, where the same analysis has been made before, on every rank.

        Raises:
            UserError: there are results of other settings, and ``force`` is not set.
        """
        found: Any = None
        if self.world.is_main:
            try:
                found = self._finished()
            except UserError as error:
                found = SharedError(str(error))
        found = self.world.share(found)
        if isinstance(found, SharedError):
            raise found
        document: Document | None = found
        return document

    def journal(self) -> Journal:
        """What earlier tries have found; made on all ranks."""
        if self.world.is_main:
            self._make_folder()
        return Journal(self.folder / f".{self.stem}.partial.jsonl", self.settings, self.world)

    def write(self, results: Document, about: Document) -> Document:
        """Write the JSON, on rank 0, whole or not at all; returns the document."""
        versions = {"lesam_dist": __version__, "torch": torch.__version__, "python": platform.python_version()}
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else platform.machine()
        document = {
            **about,
            "settings": self.settings,
            "results": _for_json(results),
            "versions": versions,
            "device": device,
            "processes": self.world.world_size,
        }
        if self.world.is_main:
            self._make_folder()
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
            self._replace("json", lambda path: path.write_text(text, encoding="utf-8"))
        return document

    def draw(self, figure: Any) -> None:
        """Write a matplotlib figure as PNG and SVG, on rank 0."""
        if self.world.is_main:
            for kind in ("png", "svg"):
                self._replace(kind, partial(figure.savefig, format=kind, dpi=130))

    def path(self, kind: str) -> Path:
        """Of the file of a kind: "json", "png" or "svg"."""
        return self.folder / f"{self.stem}.{kind}"

    def _finished(self) -> Document | None:
        file = self.path("json")
        if not file.exists():
            return None
        document: Any = None
        with suppress(OSError, ValueError):
            document = json.loads(file.read_text(encoding="utf-8"))
        there = document.get("settings") if isinstance(document, dict) else None
        if there == self.settings and isinstance(document, dict):
            return document
        if self._force:
            return None
        what = "is not of this analysis" if not isinstance(there, dict) else _difference(there, self.settings)
        raise UserError(
            f"'{file}' {what}, and is not overwritten: choose another folder with --output, or give --force."
        )

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'{self.folder}' cannot be made: {error.strerror or error}.") from error

    def _replace(self, kind: str, write: Callable[[Path], object]) -> None:
        path = self.path(kind)
        aside = path.with_name(f".{path.name}.partial")
        try:
            write(aside)
            aside.replace(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise UserError(f"'{path}' cannot be written: {error.strerror or error}.") from error


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    return "has other settings: " + ", ".join(f"{n} {there.get(n)!r} there, {now.get(n)!r} now" for n in names)


def _for_json(value: Any) -> Any:
    """With null in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _for_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
