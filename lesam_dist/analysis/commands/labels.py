"""What figures and tables of several checkpoints call them."""

from __future__ import annotations

from typing import Any


def labels(document: dict[str, Any]) -> list[str]:
    """A name for each checkpoint of a document: with its run's, unless all are of one."""
    each = document["checkpoints"]
    if len({one["run"] for one in each}) == 1:
        return [one["checkpoint"] for one in each]
    return [f"{one['run']}, {one['checkpoint']}" for one in each]


def title(document: dict[str, Any]) -> str:
    """What all checkpoints of a document share: their run; of one, its name too."""
    each = document["checkpoints"]
    if len(each) == 1:
        return f"{each[0]['run']}, {each[0]['checkpoint']}"
    return each[0]["run"] if len({one["run"] for one in each}) == 1 else ""
