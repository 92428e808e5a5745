"""What goes wrong with a run's files while nobody looks: checkpoints, logs, images, disks."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

DISK_BYTES = 6_000_000
"""Of a small disk: two or three checkpoints of these runs."""


def checkpoints(run_dir: Path) -> list[Path]:
    """The folders that look like finished checkpoints, newest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"), reverse=True)


def damage_run(kind: str, run_dir: Path, seed: int) -> str | None:
    """Damage the newest checkpoint or what belongs to it; says which file, or None where nothing can be damaged.

    The newest alone, and only where there is an older one to go back to.
    """
    draw = random.Random(seed)
    if kind == "torn-log":
        return _tear_log(run_dir / "metrics.jsonl", draw)
    found = checkpoints(run_dir)
    if kind == "pointer":
        pointer = run_dir / "checkpoints" / "latest"
        if not pointer.is_file():
            return None
        pointer.write_bytes(draw.choice([b"", b"step_99999999", b"\xff\xfe\x00", b"../..", pointer.read_bytes()[:7]]))
        return "latest"
    if len(found) < 2:
        return None
    files = sorted(path for path in found[0].iterdir() if path.is_file())
    metadata = [path for path in files if path.suffix == ".json" or path.name == ".metadata"]
    file = draw.choice(metadata if kind == "garbage" and metadata else files)
    _DAMAGES[kind](file, draw)
    return f"{found[0].name}/{file.name}"


def _tear_log(log: Path, draw: random.Random) -> str | None:
    if not log.is_file():
        return None
    text = log.read_bytes()
    last = text[: draw.randrange(1, max(2, len(text)))].split(b"\n")[-1]
    log.write_bytes(text + draw.choice([last or b"{", b'{"step": 1', b"\x00" * 40, b"\xff\xfe{}\n", b"[]\n"]))
    return log.name


def _truncate(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(max(1, len(content)))])


def _flip_bit(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _zero(file: Path, draw: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def _fill_with_garbage(file: Path, draw: random.Random) -> None:
    texts = [
        draw.randbytes(draw.randrange(1, 4000)),
        b"{}",
        b"[1, 2",
        b"null",
        b'{"files": {"../../x": {}}, "crc32": 0}',
    ]
    file.write_bytes(draw.choice(texts))


_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "bit-flip": _flip_bit,
    "zeros": _zero,
    "missing": _remove,
    "garbage": _fill_with_garbage,
}


def break_image(file: Path, how: str) -> None:
    """Make an image undecodable in one of eight ways. Only for PNG, whose checksums show what a JPEG would hide."""
    content = file.read_bytes()
    if how == "empty":
        broken = b""
    elif how == "truncated":
        broken = content[: len(content) * 2 // 3]
    elif how == "header":
        broken = content[:33]  # the signature and IHDR: its size is known, and nothing else
    elif how == "garbage":
        broken = random.Random(len(content)).randbytes(len(content))
    elif how == "zeros":
        broken = bytes(len(content))
    elif how == "html":
        broken = b"<!DOCTYPE html><title>404 Not Found</title>"
    elif how == "flipped":  # the type of the first chunk of pixels
        at = content.index(b"IDAT")
        broken = content[:at] + b"IdAX" + content[at + 4 :]
    elif how == "swapped":  # its middle twice, as after a write to the wrong place
        third = len(content) // 3
        broken = content[:third] + content[2 * third :] + content[third : 2 * third]
    else:
        raise ValueError(how)
    file.write_bytes(broken)


@cache
def can_mount() -> bool:
    """Whether small disks can be made here."""
    if shutil.which("mount") is None:
        return False
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder)):
            return True
    except OSError:
        return False


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Within, ``folder`` is a disk of `DISK_BYTES`.

    Raises:
        OSError: it cannot be made, mostly for want of rights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    try:
        yield
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    """Take a small disk away, where there is one."""
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def remount(folder: Path, *, writable: bool) -> None:
    """Make a small disk read-only, or writable again."""
    subprocess.run(["mount", "-o", f"remount,{'rw' if writable else 'ro'}", str(folder)], check=True)
