"""The file that `lesam-dist scan` writes and data.skip_list names: images that are left out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lesam_dist.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Skipped:
    """An image that is left out: its path below the data set's folder, why, its size in bytes (None: unreadable)."""

    path: str
    reason: str
    size: int | None


def write_skip_list(file: Path, skipped: Sequence[Skipped], leaks: Sequence[Sequence[str]]) -> None:
    """Write it aside, then in place of what is there.

    Args:
        file: to write.
        skipped: the images.
        leaks: images with the same content, in training and in validation; for the reader alone.

    Raises:
        OSError: it cannot be written.
    """
    content = {"version": VERSION, "skip": [asdict(each) for each in skipped], "in_both_splits": leaks}
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(file)


def read_skip_list(file: Path) -> frozenset[str]:
    """The paths in it, below the data set's folder.

    Raises:
        UserError: it cannot be read, is something else, or is of a newer version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"data.skip_list '{file}' cannot be read ({error.strerror}): write one with `lesam-dist scan`."
        ) from error
    except ValueError as error:
        raise UserError(f"data.skip_list '{file}' is no JSON ({error}): write it with `lesam-dist scan`.") from error
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"data.skip_list '{file}' is of version {version}, and this lesam-dist knows {VERSION}: update it, or "
            "write the list again with `lesam-dist scan`."
        )
    try:
        if version != VERSION:
            raise TypeError
        paths = [entry["path"] for entry in content["skip"]]
    except (TypeError, KeyError) as error:
        raise UserError(f"data.skip_list '{file}' is no list of `lesam-dist scan`: write one with it.") from error
    if not all(isinstance(path, str) for path in paths):
        raise UserError(f"data.skip_list '{file}' is no list of `lesam-dist scan`: write one with it.")
    return frozenset(paths)
