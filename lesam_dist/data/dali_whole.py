"""Whether DALI can decode a whole file: for files that are in doubt, and for `lesam-dist scan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import nvidia.dali
from numpy.typing import NDArray

from lesam_dist.data.decode import open_image, to_rgb
from lesam_dist.data.errors import Failure, reason_of
from lesam_dist.data.plan import Batch
from lesam_dist.data.reading import read_each
from lesam_dist.data.shards import Part

dali: Any = nvidia.dali  # its type stubs leave out much of what it exports
fn, types = dali.fn, dali.types

DECODER = {
    "adjust_orientation": False,
    "jpeg_fancy_upsampling": True,  # as Pillow decodes; costs nothing measurable
}

_JPEG_BEGIN, _JPEG_END = (0xFF, 0xD8), (0xFF, 0xD9)  # its first marker, and its last


class WholeDecoder:
    """Decodes files on the CPU, one after the other; it is built when it is needed, and anew after each failure."""

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._encoded: NDArray[np.uint8] | None = None

    def why_not(self, data: bytes) -> str | None:
        """The reason why DALI does not decode these bytes, often a mere number; None where it does."""
        if not data:
            return "empty file"  # which it cannot be given
        self._encoded = np.frombuffer(data, dtype=np.uint8)
        if self._pipeline is None:
            self._pipeline = _pipeline(self._next, batch_size=1, num_threads=1)
        try:
            self._pipeline.run()
        except RuntimeError as error:
            self._pipeline = None
            return _reason(error)
        return None

    def _next(self) -> list[NDArray[np.uint8]]:
        assert self._encoded is not None
        return [self._encoded]


class Doubtful:
    """Files of which DALI may decode a crop although it cannot decode the whole: so a crop's luck would decide.

    These are JPEGs that do not end as one should, being cut off or followed by something, and TIFFs. Each is decoded as
    a whole, once.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = num_threads
        self._whole: set[str] = set()

    def failures(self, batch: Batch, edges: NDArray[np.uint8]) -> list[Failure]:
        """Those of a batch's files that cannot be decoded as a whole.

        Args:
            batch: of B files, of which DALI has decoded a crop.
            edges: uint8 ``(B, 4)``, the first and the last two bytes of each.
        """
        paths = batch.paths
        begin, end = edges[:, :2], edges[:, 2:]
        is_jpeg, is_whole = (begin == _JPEG_BEGIN).all(axis=1), (end == _JPEG_END).all(axis=1)
        is_tiff = (begin[:, 0] == begin[:, 1]) & ((begin[:, 0] == ord("I")) | (begin[:, 0] == ord("M")))
        indices = [i for i in np.flatnonzero(is_tiff | (is_jpeg & ~is_whole)).tolist() if paths[i] not in self._whole]
        if not indices:
            return []
        doubtful = batch.take(indices)
        failures = [] if _all_decode(doubtful, self._threads) else find_failures(doubtful.paths, doubtful.parts)
        self._whole |= set(doubtful.paths) - {failure.path for failure in failures}
        return [replace(failure, index=indices[failure.index]) for failure in failures]


def find_failures(paths: Sequence[str], parts: Sequence[Part] | None) -> list[Failure]:
    """Every one of these files that DALI cannot decode, or nobody can read; one by one."""
    decoder = WholeDecoder()
    failures: list[Failure] = []
    for i, data in enumerate(read_each(paths, parts)):
        if isinstance(data, OSError):
            failures.append(Failure(i, paths[i], reason_of(data), None))
        elif reason := decoder.why_not(data):
            failures.append(Failure(i, paths[i], f"DALI: {reason}; Pillow: {_pillow_says(data)}", len(data)))
    return failures


def _pillow_says(data: bytes) -> str:
    """DALI's own reason is often a mere number."""
    try:
        with open_image(data) as image:
            to_rgb(image)
            return f"reads it, as {image.format}"
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        return reason_of(error)


def _all_decode(batch: Batch, num_threads: int) -> bool:
    """Whether DALI decodes every one of these files; all in one run."""
    encoded: list[NDArray[np.uint8]] = []
    for data in read_each(batch.paths, batch.parts):
        if isinstance(data, OSError) or not data:
            return False
        encoded.append(np.frombuffer(data, dtype=np.uint8))
    try:
        _pipeline(lambda: encoded, batch_size=len(batch), num_threads=num_threads).run()
    except RuntimeError:
        return False
    return True


def _pipeline(source: Any, batch_size: int, num_threads: int) -> Any:
    """Works on one batch at a time, and not ahead."""
    pipeline = dali.Pipeline(batch_size, num_threads, None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source, dtype=types.UINT8, ndim=1)
        shape = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[:2], dtype=types.INT32)
        # One after the other, as in `lesam_dist.data.dali`, which says why.
        image = fn.decoders.image_slice(encoded, start=(0, 0), shape=shape, axes=(0, 1), device="cpu", **DECODER)
        pipeline.set_outputs(image.shape())
    return pipeline


def _reason(error: RuntimeError) -> str:
    """Without the traceback of its graph."""
    _, _, reason = str(error).partition("encountered:")
    line = (reason.strip() or str(error)).splitlines()[0].rstrip(" :")
    return "failed to decode it" if line.startswith("Failed to decode sample") else line
