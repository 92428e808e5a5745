"""Processes and who holds what: launchers, shards, wrapping, replicas, blocks.

The names are imported when they are first used: reading the launcher's environment needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesam_dist.parallel.processes import Distributed, process_group
    from lesam_dist.parallel.wrapping import wrap

__all__ = ["Distributed", "process_group", "wrap"]

_FILES = {"Distributed": "processes", "process_group": "processes", "wrap": "wrapping"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
