"""One shard of `lesam-dist pack`, written by a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from lesam_dist.data.decode import decode_rgb
from lesam_dist.data.errors import reason_of
from lesam_dist.data.reading import read_file

_BLOCK = tarfile.BLOCKSIZE
_AT_ONCE = 1 << 22  # bytes


class Resize(NamedTuple):
    """What images become: their short side in pixels where it is longer, and the quality of their JPEGs, 1 to 100."""

    short_side: int
    quality: int


@dataclass(frozen=True)
class Task:
    """A shard to write.

    Attributes:
        file: the tar file.
        paths: images, in the order in which they come.
        keys: of each, the number that its members are called by.
        labels: of each.
        resize: None keeps files as they are.
    """

    file: Path
    paths: list[str]
    keys: list[int]
    labels: list[int]
    resize: Resize | None


class Written(NamedTuple):
    """A shard that is done: of each image the first byte, the size and the CRC-32; of the file size and SHA-256."""

    starts: list[int]
    sizes: list[int]
    crcs: list[int]
    size: int
    sha256: str


class PackError(Exception):
    """An image that cannot be packed, in one line."""


def ignore_interrupts() -> None:
    """Ctrl-C is the parent's; the shards at work are finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def sidecar(file: Path) -> Path:
    """Where it is kept what a shard that is done holds, until all are done."""
    return file.with_name(f".{file.name}.json")


def write_shard(task: Task) -> Written:
    """Write a shard aside, then in its place; the same bytes whenever and wherever.

    Raises:
        PackError: an image cannot be read or decoded.
        OSError: the shard cannot be written.
    """
    aside = task.file.with_name(f".{task.file.name}.partial")
    starts, sizes, crcs = [], [], []
    try:
        with open(aside, "wb") as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for path, key, label in zip(task.paths, task.keys, task.labels, strict=True):
                suffix, data = _content(path, task.resize)
                starts.append(_add(tar, f"{key:08d}{suffix}", data))
                sizes.append(len(data))
                crcs.append(zlib.crc32(data))
                _add(tar, f"{key:08d}.cls", str(label).encode())
        size, sha256 = aside.stat().st_size, sha256_of(aside)
        aside.replace(task.file)
    finally:
        aside.unlink(missing_ok=True)
    written = Written(starts, sizes, crcs, size, sha256)
    note = sidecar(task.file)
    note_aside = note.with_name(f"{note.name}.partial")
    note_aside.write_text(json.dumps(written))
    note_aside.replace(note)
    return written


def read_written(file: Path) -> Written | None:
    """What a shard holds that an earlier call has finished; None if there is none."""
    try:
        written = Written(*json.loads(sidecar(file).read_text()))
        return written if file.stat().st_size == written.size else None
    except (OSError, ValueError, TypeError):
        return None


def sha256_of(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        while block := opened.read(_AT_ONCE):
            yield block


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member without date and owner; returns its first byte in the file."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    start: int = tar.offset + _BLOCK  # a short name's header is one block
    tar.addfile(member, io.BytesIO(data))
    return start


def _content(path: str, resize: Resize | None) -> tuple[str, bytes]:
    """The ending and the bytes of a member."""
    try:
        data = read_file(path)
    except OSError as error:
        raise PackError(f"cannot open the image '{path}' ({reason_of(error)})") from error
    suffix = os.path.splitext(path)[1].lower()
    if resize is None:
        return suffix, data
    try:
        smaller = _resized(data, resize)
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise PackError(f"cannot decode the image '{path}' of {len(data)} bytes ({reason_of(error)})") from error
    return (suffix, data) if smaller is None else (".jpg", smaller)


def _resized(data: bytes, resize: Resize) -> bytes | None:
    """A JPEG of the smaller image; None where it is small already."""
    pixels = decode_rgb(data)
    short = min(pixels.shape[:2])
    if short <= resize.short_side:
        return None
    height, width = (max(1, round(side * resize.short_side / short)) for side in pixels.shape[:2])
    image: Any = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), resize.quality, "RGB", "420", fastdct=False)
    return encoded
