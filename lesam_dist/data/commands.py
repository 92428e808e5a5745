"""What the commands on data sets have in common."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lesam_dist.data.packed.layout import INDEX
from lesam_dist.data.urls import is_url
from lesam_dist.errors import UserError, one_line


def local_folder(text: str) -> Path:
    """A folder as the user gave it.

    Raises:
        UserError: it is an address, or cannot be a path.
    """
    if is_url(text):
        raise UserError(f"'{text}' is an address, and this command works on folders alone: give a folder.")
    folder = Path(text).expanduser()
    try:
        os.stat(folder)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"'{one_line(text)}' cannot be a folder: {getattr(error, 'strerror', error)}.") from None
    return folder


def class_folders(text: str) -> Path:
    """A data set's folder as the user gave it, for what reads class folders.

    Raises:
        UserError: it is an address, or a packed data set.
    """
    root = local_folder(text)
    if (root / INDEX).is_file():
        raise UserError(
            f"'{root}' is packed already: give the folder that holds train/CLASS/IMAGE. `lesam-dist pack --verify` "
            "checks packed images."
        )
    return root


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere; call what is yielded with the number of things done."""
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
