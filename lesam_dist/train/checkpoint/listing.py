"""`lesam-dist checkpoints`: what a run has saved, whether it is whole, and less of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lesam_dist.config.parser import Parser, examples
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import manifest
from lesam_dist.train.checkpoint.folder import Folder, folder_in, name_of, remove, result
from lesam_dist.train.checkpoint.loading import verified
from lesam_dist.train.checkpoint.manifest import DamagedError

_TEXT = """
List a run's checkpoints, newest first. acc1 is the top-1 accuracy in per cent, in whose place another task has what it
is compared by, of the averaged weights where the run has some; a checkpoint is finite where its weights and the steps
before it were numbers. Use --prune and --delete when the run is not going on.
"""
_HEADER = ("checkpoint", "epoch", "processes", "size", "saved", "acc1", "finite", "", "state")


@dataclass
class _Row:
    """A checkpoint; ``content``: of its manifest, empty where that cannot be read."""

    name: str
    content: dict[str, Any]
    fault: str | None
    is_verified: bool


def checkpoints(argv: Sequence[str]) -> None:
    """The command; exits with status 1 where --verify finds damage.

    Raises:
        UserError: no checkpoints there; one that cannot be removed.
    """
    parser = Parser("checkpoints", _TEXT, examples("checkpoints runs/default --verify"))
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--verify", action="store_true", help="read all files; status 1 where one is damaged")
    parser.add_argument(
        "--prune",
        type=_positive,
        metavar="K",
        help="remove all whole ones but the newest K, the best and the newest finite one; they are verified first",
    )
    parser.add_argument("--delete", metavar="NAME", help="remove this one, e.g. step_00000240 or 240, whole or not")
    args = parser.parse_args(argv)
    folder = Folder(folder_in(args.run))
    if not folder.names():
        raise UserError(f"'{args.run}' has no checkpoints: name the folder of a run.")
    verify = args.verify or args.prune is not None or args.delete is not None
    rows = [_look(folder, name, verify) for name in folder.names()]
    gone: list[str] = []
    if args.prune is not None:
        gone = _too_many(folder, rows, args.prune)
    if args.delete is not None:
        gone = [*gone, _deletable(rows, args.delete, gone)]
    print(_table(folder, rows), flush=True)
    for name in dict.fromkeys(gone):
        try:
            remove(folder.path / name)
        except OSError as error:
            raise UserError(f"{folder.path / name} cannot be removed: {error.strerror or error}.") from error
        print(f"removed {name}")
    damaged = [row.fault for row in rows if row.fault]
    for fault in damaged:
        print(fault)
    if args.verify and damaged:
        sys.exit(1)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "number, which is at least 1,"  # in argparse's message


def _look(folder: Folder, name: str, verify: bool) -> _Row:
    path = folder.path / name
    content: dict[str, Any] = {}
    try:
        content, files = manifest.read(path)
        manifest.format_of(path, content)
        if verify:
            verified(path, Distributed(0, 0, 1, torch.device("cpu")))
        for file, expected in files.items():
            manifest.check_size(path / file, expected)
    except (DamagedError, UserError) as error:
        return _Row(name, content, str(error), verify)
    return _Row(name, content, None, verify)


def _too_many(folder: Folder, rows: Sequence[_Row], keep: int) -> list[str]:
    whole = [row.name for row in rows if not row.fault]
    stay = {*whole[:keep], folder.best(whole)}
    stay.update([row.name for row in rows if not row.fault and row.content.get("finite") is True][:1])
    return [name for name in whole if name not in stay]


def _deletable(rows: Sequence[_Row], wanted: str, gone: Sequence[str]) -> str:
    names = [row.name for row in rows]
    name = name_of(int(wanted)) if wanted.isdecimal() else wanted
    if name not in names:
        raise UserError(f"there is no checkpoint '{wanted}': there are {', '.join(names)}.")
    left = [row.name for row in rows if not row.fault and row.name != name and row.name not in gone]
    if not left and not next(row.fault for row in rows if row.name == name):
        raise UserError(f"{name} is the only checkpoint that is whole: remove the run's folder if you want none.")
    return name


def _table(folder: Folder, rows: Sequence[_Row]) -> str:
    latest, best = folder.latest(), folder.best(row.name for row in rows if not row.fault)
    metric = next((result(row.content)[0] for row in rows if row.content), "acc1")
    lines = [tuple(metric if cell == "acc1" else cell for cell in _HEADER)]
    for row in rows:
        marks = [text for text, name in (("latest", latest), ("best", best)) if name == row.name]
        state = "damaged" if row.fault else "verified" if row.is_verified else "complete"
        _, value, _ = result(row.content)
        lines.append(
            (
                row.name,
                str(row.content.get("epoch", "-")),
                str(row.content.get("world_size", "-")),
                _size(folder.path / row.name),
                _saved(folder.path / row.name, row.content),
                "-" if value is None else f"{value:.2f}",
                "yes" if row.content.get("finite") is True else "no" if row.content else "-",
                " ".join(marks),
                state,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _size(path: Path) -> str:
    total = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return f"{total / 1e6:.1f} MB"


def _saved(path: Path, content: dict[str, Any]) -> str:
    found = content.get("saved")
    if not isinstance(found, str):  # format 1
        found = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    return found.replace("T", " ").replace("+00:00", " UTC")
