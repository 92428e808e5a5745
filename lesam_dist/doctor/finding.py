"""What a check has found, and that a check which fails is a finding too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        name: what was looked at, e.g. "GPU 0".
        status: "problem" keeps runs from working, "warning" makes them slower or is not what one may expect.
        text: what was found, in plain words.
        remedy: what to do; "" where there is nothing to do.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; what it raises is one of them, behind those that it had already."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # of any package that is broken here
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        found.append(Finding(name, "problem", f"could not be checked: {said}", "see whether the package is whole"))
    return found


def gib(count: float) -> str:
    """Bytes in GiB, as they are read."""
    return f"{count / 2**30:.3g} GiB" if count < 1000 * 2**30 else f"{count / 2**40:.3g} TiB"
