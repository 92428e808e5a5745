"""One checkpoint on its way to the disk: by all ranks, in the thread that trains or beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.train.checkpoint import index as index_file
from lesam_dist.train.checkpoint import manifest, payload
from lesam_dist.train.checkpoint.channel import Channel, FailedError, on_all, on_first
from lesam_dist.train.checkpoint.folder import Folder, name_of
from lesam_dist.train.checkpoint.index import Index
from lesam_dist.train.checkpoint.manifest import Files
from lesam_dist.train.checkpoint.planning import file_of


@dataclass(frozen=True)
class Job:
    """What is to be written.

    ``tensors``: this rank's, by their keys. ``index``, and ``content`` of the manifest but for checksums: rank 0's.
    """

    step: int
    tensors: Mapping[str, Tensor]
    index: Index
    content: dict[str, Any]


def write(job: Job, folder: Folder, config: CheckpointConfig, channel: Channel) -> None:
    """Have it on disk under its name, and then remove what is no longer kept; every rank takes part.

    Raises:
        FailedError: on every rank; what was there before is untouched.
    """
    name = name_of(job.step)
    aside = folder.path / f".{name}.partial"
    try:
        on_first(channel, partial(_begin, folder, aside))
        written = on_all(channel, partial(_write_share, aside, channel.rank, job.tensors))
        on_first(channel, partial(_finish, job, aside, name, written, folder))
    except FailedError:
        if channel.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if channel.rank == 0:
        with suppress(OSError):  # the checkpoint is there; what is too many the next one removes
            folder.prune(name, config)


def _begin(folder: Folder, aside: Path) -> None:
    folder.sweep()
    aside.mkdir(parents=True)


def _write_share(aside: Path, rank: int, tensors: Mapping[str, Tensor]) -> Files:
    """A rank with nothing to write has no file."""
    name = file_of(rank)
    return {name: payload.write(aside / name, tensors)} if tensors else {}


def _finish(job: Job, aside: Path, name: str, written: list[Files], folder: Folder) -> None:
    files: Files = {}
    for part in written:
        files |= part
    files[index_file.NAME] = manifest.write_bytes(aside / index_file.NAME, index_file.dump(job.index))
    manifest.write(aside, {**job.content, "files": files})
    folder.publish(aside, name)
