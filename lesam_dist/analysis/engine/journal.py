"""What a long analysis has found so far, so that the same command goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lesam_dist.parallel.processes import Distributed


class Journal:
    """Results by name; with a file, a line of JSON for each, written by rank 0 and read by all.

    Args:
        path: of the file; None keeps them in memory.
        settings: what must be equal for results to be of the same analysis; a file of others is started anew.
        world: this process among all; None for one alone.
    """

    def __init__(
        self, path: Path | None = None, settings: dict[str, Any] | None = None, world: Distributed | None = None
    ) -> None:
        self._path, self._world = path, world
        self._main = world is None or world.is_main
        self._found: dict[str, Any] = {}
        if path is None:
            return
        if self._main:
            self._found = _read(path, settings)
            lines = [settings, *map(list, self._found.items())]  # anew, without a line that was cut off
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if world is not None:
            self._found = world.share(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of this name, which ``compute`` makes where there is none; all ranks call it alike.

        It must be one that JSON has.
        """
        if name not in self._found:
            self.put(name, compute())
        return self._found[name]

    def put(self, name: str, value: Any) -> None:
        """Keep a result."""
        self._found[name] = value
        if self._path is not None and self._main:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, value]) + "\n")

    def remove(self) -> None:
        """The analysis is done: the file goes."""
        if self._path is not None and self._main:
            self._path.unlink(missing_ok=True)


def _read(path: Path, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Results of a file with the same settings, without a line that was cut off."""
    if not path.is_file():
        return {}
    first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    with suppress(ValueError):
        if json.loads(first) == json.loads(json.dumps(settings)):
            return dict(filter(None, map(_entry, lines)))
    return {}


def _entry(line: str) -> tuple[str, Any] | None:
    with suppress(ValueError):
        name, value = json.loads(line)
        return name, value
    return None
