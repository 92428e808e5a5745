"""One file in `lesam-dist scan`: decoded as the loaders do, in a process that may die of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import warnings
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from PIL import Image

from lesam_dist.data.decode import decode_rgb, open_image
from lesam_dist.data.errors import reason_of
from lesam_dist.data.reading import read_file


class Verdict(NamedTuple):
    """What is known of a file.

    Attributes:
        size: in bytes; None where it cannot be read.
        mtime: in nanoseconds, with the size for telling whether it has changed.
        reason: why it is broken; "" where it is not.
        digest: of its content.
        odd: what is unusual about a file that can be used.
    """

    size: int | None
    mtime: int
    reason: str
    digest: str
    odd: tuple[str, ...] = ()


def has_dali() -> bool:
    """Whether the loaders may decode with DALI here."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def work(pipe: Connection) -> None:
    """Answer each path with its `Verdict`, until there is None or the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who closes the pipe
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # decoders in C print each fault
    decoder: Any = None
    if has_dali():
        from lesam_dist.data.dali_whole import WholeDecoder

        decoder = WholeDecoder()
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)  # ready
        while (path := pipe.recv()) is not None:
            pipe.send(examine(path, decoder))


def examine(path: str, decoder: Any) -> Verdict:
    """Read and decode a file, as the torchvision backend does and, where there is a `WholeDecoder`, with DALI."""
    try:
        facts = os.stat(path)
        data = read_file(path)
    except OSError as error:
        return Verdict(None, 0, f"cannot be read: {reason_of(error)}", "")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    if not data:
        return Verdict(0, facts.st_mtime_ns, "zero bytes", digest)
    reasons: list[str] = []
    odd: tuple[str, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(data) as image:
                odd = _oddities(path, image)
            decode_rgb(data)
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        reasons.append(f"Pillow: {reason_of(error)}")
    if decoder is not None and (why := decoder.why_not(data)):
        reasons.append(f"DALI: {why}")
    return Verdict(len(data), facts.st_mtime_ns, "; ".join(reasons), digest, () if reasons else odd)


def _oddities(path: str, image: Image.Image) -> tuple[str, ...]:
    expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    found = {
        "16-bit": image.mode.startswith("I"),
        "CMYK": image.mode == "CMYK",
        "whose name and format differ": expected is not None and expected != image.format,
    }
    return tuple(name for name, is_so in found.items() if is_so)
