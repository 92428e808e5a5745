"""How figures and tables name checkpoints and write numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def labels(document: dict[str, Any]) -> list[str]:
    """A name for each checkpoint of a document: with its run's, unless all are of one."""
    each = _checkpoints(document)
    if len({one["run"] for one in each}) == 1:
        return [one["checkpoint"] for one in each]
    return [f"{one['run']}, {one['checkpoint']}" for one in each]


def title(document: dict[str, Any]) -> str:
    """What all checkpoints of a document share: their run; of one, its name too."""
    each = _checkpoints(document)
    if len(each) == 1:
        return f"{each[0]['run']}, {each[0]['checkpoint']}"
    return each[0]["run"] if len({one["run"] for one in each}) == 1 else ""


def number(value: float | None) -> str:
    """Of a document, which has no number for what is not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def reals(values: Iterable[float | None]) -> list[float]:
    """The same for matplotlib, which leaves nan out."""
    return [float("nan") if value is None else value for value in values]


def plus_minus(estimate: dict[str, Any]) -> str:
    """The standard error of an `Estimate` behind its mean; nothing for a single draw."""
    error = estimate["standard_error"]
    return "" if error is None else f" ± {error:.2g}"


def _checkpoints(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document.get("checkpoints", [document])
    return found
