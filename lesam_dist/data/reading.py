"""Read an image's bytes, with patience: from a file of its own, from its part of a shard, or from an object store."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat
from typing import Any

from lesam_dist.data.shards import Part
from lesam_dist.data.urls import is_url

# What a network file system says of a file that may be there again in a moment.
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_PAUSES = (0.1, 0.3, 1.0)  # seconds
_PATIENCE = 4  # files of a batch that are waited for: of a file system that is gone, not one after the other
_AT_ONCE = 64  # requests to an object store
_OPEN_SHARDS = 64  # an open file saves a question to the file system's server for each image


def read_file(path: str, part: Part | None = None, *, patient: bool = True) -> bytes:
    """All bytes of an image.

    Args:
        path: of the file.
        part: where the image lies instead, if it has no file of its own.
        patient: after an error that may pass (EIO, ESTALE, ETIMEDOUT), try again three times within 1.4 s.

    Raises:
        OSError: it cannot be read.
    """
    for pause in _PAUSES if patient else ():
        try:
            return _read(path, part)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
        time.sleep(pause)
    return _read(path, part)


def read_each(paths: Sequence[str], parts: Sequence[Part] | None) -> Iterator[bytes | OSError]:
    """The bytes of each image of a batch, or why it cannot be read; those of an object store all at once."""
    if parts and is_url(parts[0].shard):
        with ThreadPoolExecutor(min(len(parts), _AT_ONCE)) as pool:  # each of them waits most of the time
            yield from pool.map(_read_or_not, paths, parts, repeat(True))
        return
    failures = 0
    for path, part in zip(paths, parts or repeat(None), strict=False):
        data = _read_or_not(path, part, failures < _PATIENCE)
        failures += isinstance(data, OSError)
        yield data


def _read_or_not(path: str, part: Part | None, patient: bool) -> bytes | OSError:
    try:
        return read_file(path, part, patient=patient)
    except OSError as error:
        return error


def _read(path: str, part: Part | None) -> bytes:
    if part is None:
        with open(path, "rb") as file:
            return file.read()
    data = _read_remote(part) if is_url(part.shard) else _read_local(part)
    if len(data) != part.size:
        raise OSError(f"its shard '{part.shard}' ends {part.size - len(data)} bytes too early")
    return data


def _read_local(part: Part) -> bytes:
    shard = _opened(part.shard)
    data = os.pread(shard.number, part.size, part.start)
    while 0 < len(data) < part.size and (more := os.pread(shard.number, part.size - len(data), part.start + len(data))):
        data += more  # a read may end early, by a signal for one
    return data


class _Opened:
    """An open file, for as long as somebody has this."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: str) -> _Opened:
    return _Opened(path)


def _read_remote(part: Part) -> bytes:
    files, path = file_system(part.shard)
    try:
        data: bytes = files.cat_file(path, start=part.start, end=part.start + part.size)
    except OSError:
        raise
    except Exception as error:  # each store's client has its own
        raise OSError(f"{type(error).__name__}: {error}") from error
    return data


@lru_cache(maxsize=_OPEN_SHARDS)
def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path there.

    Raises:
        ValueError: of an unknown scheme.
        ImportError: a package of that scheme is not installed.
    """
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    return files, path
