"""manifest.json of a checkpoint: its format, the progress of a run, and a checksum of every file, itself included.

Checksums are CRC-32: 0.4 s per GB on one core, where BLAKE2b takes 1 s. They find damage. They do not find forgery,
since whoever changes a file can change its checksum too: the readers of the formats make forged files harmless.
Every format has its number and its own checksum here in the same way, so that an old version can name a new one.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lesam_dist import __version__
from lesam_dist.errors import UserError

NAME = "manifest.json"
FORMAT = 2
"""What this version writes; 1 was torch.distributed.checkpoint's own files, with pickles in them."""
_CHUNK = 1 << 20
Checksum = dict[str, int]  # size in bytes, crc32
Files = dict[str, Checksum]


class DamagedError(Exception):
    """What is wrong with which file, in one line."""


def checksums(folder: Path, names: Iterable[str]) -> Files:
    """Size and checksum of these files, as they are on disk."""
    return {name: _checksum(folder / name) for name in names}


def verify(folder: Path, files: Files) -> None:
    """Compare files with what the manifest says.

    Raises:
        DamagedError: for the first that is missing, of another size or of another content.
    """
    for name, expected in files.items():
        path = folder / name
        check_size(path, expected)
        try:
            found = _checksum(path)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from error
        if found != expected:
            raise DamagedError(f"{path} is damaged: its checksum is {found['crc32']:08x}, not {expected['crc32']:08x}")


def read_verified(path: Path, expected: Checksum) -> bytes:
    """The content of a small file; raises `DamagedError` where it is not what was written."""
    verify(path.parent, {path.name: expected})
    content = path.read_bytes()
    if zlib.crc32(content) != expected["crc32"]:
        raise DamagedError(f"{path} has just been changed")
    return content


def check_no_others(folder: Path, files: Files) -> None:
    """Raise `DamagedError` for a file that nobody wrote; hidden ones are a file system's, or of a killed process."""
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name != NAME and not path.name.startswith("."):
            raise DamagedError(f"{path} does not belong to the checkpoint: the manifest does not name it")


def check_size(path: Path, expected: Checksum) -> None:
    """Raise `DamagedError` for a file that is missing or of another size, without reading it."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    if path.stat().st_size != expected["size"]:
        raise DamagedError(f"{path} is truncated: {path.stat().st_size} of {expected['size']} bytes")


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest, whole or not at all; ``content`` is JSON, with ``files``."""
    content = json.loads(json.dumps(content))  # as it will be read: keys are texts
    write_bytes(folder / NAME, json.dumps({**content, "crc32": _own_checksum(content)}, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> Checksum:
    """Write a small file, whole or not at all, and have it on disk; its name is there after `sync_folder`."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise
    return {"size": len(content), "crc32": zlib.crc32(content)}


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that knows no such thing
            raise
    finally:
        os.close(opened)


def read(folder: Path) -> tuple[dict[str, Any], Files]:
    """The content of a manifest, and the files in it.

    Raises:
        DamagedError: where it is missing, not a manifest, or not what was written.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict) or "crc32" not in content:
        raise DamagedError(f"{path} has no checksums: it is no manifest, or of a version before 0.1.0")
    if content.pop("crc32") != _own_checksum(content):
        raise DamagedError(f"{path} is damaged: its content is not that of its checksum")
    files = content.pop("files", None)
    if not _is_files(files):
        raise DamagedError(f"{path} names no files with their size and checksum")
    if not isinstance(content.get("values", {}), dict):
        raise DamagedError(f"{path} holds no values by name")
    return content, files


def progress_of(content: dict[str, Any]) -> dict[str, Any]:
    """The progress in a manifest's content: all but what describes the files."""
    return {name: value for name, value in content.items() if name not in ("format", "values")}


def format_of(path: Path, content: dict[str, Any]) -> int:
    """The format of a checkpoint, by its manifest.

    Raises:
        UserError: it is of a later version than this one.
        DamagedError: it is none.
    """
    found = content.get("format", 1)  # the first did not say
    if type(found) is not int or found < 1:
        raise DamagedError(f"{path / NAME} says that its format is {found!r}")
    if found > FORMAT:
        raise UserError(
            f"the checkpoint {path} has format {found}, and this version of lesam-dist ({__version__}) reads up to "
            f"format {FORMAT}: install a newer one (pip install --upgrade lesam-dist)."
        )
    return found


def _is_files(files: Any) -> bool:
    """Whether this has the shape of `Files`, with names of files in the folder itself."""
    return isinstance(files, dict) and all(
        os.path.basename(name) == name
        and isinstance(entry, dict)
        and entry.keys() == {"size", "crc32"}
        and all(type(value) is int for value in entry.values())
        for name, entry in files.items()
    )


def _checksum(path: Path) -> Checksum:
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {"size": size, "crc32": crc}


def _own_checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
