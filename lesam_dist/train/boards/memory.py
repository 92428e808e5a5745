"""What a service has of a run, kept in the run's folder, so that a resumed run goes on with it there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


class Memory:
    """The run's id at a service, and the last step sent of each scalar.

    A run that is resumed, or goes back after a jump of its loss, makes steps that the service has seen. What services
    do with a step that comes twice differs, and none takes one back: so each scalar of each step is sent once, the
    first time.

    Args:
        file: JSON; its folder is made. It never holds more than id and steps.
        fresh: forget what is in it, of a run that is not resumed.
    """

    def __init__(self, file: Path, *, fresh: bool) -> None:
        self._file = file
        self.id: str | None = None
        self._sent: dict[str, int] = {}
        if not fresh:
            with suppress(OSError, ValueError, KeyError, TypeError):
                there = json.loads(file.read_text(encoding="utf-8"))
                self.id, self._sent = str(there["id"]), {str(k): int(v) for k, v in there["sent"].items()}

    def unsent(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Those of the values that have not been sent of this step or a later one."""
        return {name: value for name, value in values.items() if step > self._sent.get(name, -1)}

    def sent(self, values: Mapping[str, float], step: int) -> None:
        """These have arrived, as far as the service says so."""
        self._sent |= dict.fromkeys(values, step)
        self._write()

    def named(self, run_id: str) -> None:
        """The service has given the run this id."""
        self.id = run_id
        self._write()

    def _write(self) -> None:
        aside = self._file.with_name(f".{self._file.name}.partial")
        with suppress(OSError):  # a disk that is full now: at worst a resumed run sends some steps twice
            self._file.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps({"id": self.id, "sent": self._sent}), encoding="utf-8")
            aside.replace(self._file)
