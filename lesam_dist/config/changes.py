"""Which fields of a section a config has changed: those that a run would not look at are refused by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def changes(section: Any, names: Iterable[str] | None = None) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of each field that is not at its default.

    Args:
        section: a dataclass of the schema, all of whose fields have defaults.
        names: fields to look at; None takes all.
    """
    default = type(section)()
    for name in vars(default) if names is None else names:
        value, usual = getattr(section, name), getattr(default, name)
        if value != usual:
            yield name, value, usual
