"""Write a packed data set: which image goes where, the shards by several processes, the index at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.commands import progress_bar
from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.fork_server import fork_server, interrupted_afterwards
from lesam_dist.data.index import Split
from lesam_dist.data.listing import Listing, names_of
from lesam_dist.data.packed.layout import CHECKSUMS, CLASSES, INDEX, KIND, SPLITS, shard_name
from lesam_dist.data.packed.writing import (
    PackError,
    Resize,
    Task,
    Written,
    ignore_interrupts,
    read_written,
    sidecar,
    write_shard,
)
from lesam_dist.errors import UserError

_SETTINGS = ".pack.json"  # of a packing that is not finished
_SHUFFLE_SEED = 0  # so that a shard holds images of all classes, and the same ones whenever it is packed


def _digest(split: ImageFolder, resize: Resize | None) -> str:
    """That of the folder where the files are the same, so that a run may go on with the other."""
    return split.digest if resize is None else f"{split.digest}-{resize.short_side}px-q{resize.quality}"


def pack_splits(
    splits: Split, out: Path, resize: Resize | None, per_shard: int, workers: int
) -> tuple[list[list[Written]], int]:
    """Write the shards that are missing; without an index they are not a data set yet.

    Args:
        splits: training and validation images.
        out: folder for the shards, new or of a call with the same arguments that was not finished.
        resize: None keeps files as they are.
        per_shard: images of a shard.
        workers: processes.

    Returns:
        What the shards of each split hold, and how many of them were written now.

    Raises:
        UserError: an image cannot be packed, or the folder holds something else.
        OSError: a shard cannot be written.
    """
    settings = {"digests": [_digest(split, resize) for split in splits], "images_per_shard": per_shard}
    _claim(out, settings)
    tasks = [list(_tasks(name, split, out, resize, per_shard)) for name, split in zip(SPLITS, splits, strict=True)]
    known = {task.file: written for each in tasks for task in each if (written := read_written(task.file))}
    todo = [task for each in tasks for task in each if task.file not in known]
    images = sum(map(len, splits))
    packed = images - sum(len(task.paths) for task in todo)
    with progress_bar("packing", images) as progress:
        try:
            for task, written in _write_all(todo, workers):
                known[task.file] = written
                packed += len(task.paths)
                progress(packed)
        except PackError as error:
            raise UserError(
                f"{error}: mend or remove it, or find all such images with `lesam-dist scan` and leave them out with "
                "--skip_list."
            ) from error
    return [[known[task.file] for task in each] for each in tasks], len(todo)


def _write_all(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Written]]:
    """Each shard when it is done; after an error those at work are finished."""
    if workers == 1:
        yield from ((task, write_shard(task)) for task in tasks)
        return
    context = fork_server(write_shard.__module__)
    with ProcessPoolExecutor(min(workers, max(1, len(tasks))), context, ignore_interrupts) as pool:
        try:
            with interrupted_afterwards():
                futures: dict[Future[Written], Task] = {pool.submit(write_shard, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or see that what it holds is of the same data and settings."""
    out.mkdir(parents=True, exist_ok=True)
    note = out / _SETTINGS
    if note.exists():
        before = json.loads(note.read_text())
    elif any(out.iterdir()):
        raise UserError(f"'{out}' is not empty: choose a new folder, or remove what is there.")
    else:
        note.write_text(json.dumps(settings))
        return
    if before != settings:
        raise UserError(
            f"'{out}' holds shards of other images or settings, from a call that was not finished: choose another "
            "folder, or remove it."
        )


def _tasks(name: str, split: ImageFolder, out: Path, resize: Resize | None, per_shard: int) -> Iterator[Task]:
    for number, samples in enumerate(_samples_of_shards(name, len(split), per_shard)):
        paths, labels = [split.paths[i] for i in samples], split.labels[samples].tolist()
        yield Task(out / shard_name(name, number), paths, samples.tolist(), labels, resize)


def _samples_of_shards(name: str, n: int, per_shard: int) -> list[NDArray[np.int64]]:
    """Training images are shuffled, for those who read from front to back; validation images are not."""
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(n) if name == "train" else np.arange(n)
    return [order[begin : begin + per_shard] for begin in range(0, n, per_shard)]


def write_index(
    out: Path, splits: Split, resize: Resize | None, per_shard: int, written: Sequence[Sequence[Written]]
) -> None:
    """All that readers need, the index last: a folder with one is finished."""
    facts: dict[str, Any] = {"kind": KIND, "classes": list(splits[0].classes), "resize": resize}
    arrays: dict[str, NDArray[Any]] = {}
    checksums = []
    for name, split, shards in zip(SPLITS, splits, written, strict=True):
        files = [shard_name(name, number) for number in range(len(shards))]
        named = [(file, each.size, each.sha256) for file, each in zip(files, shards, strict=True)]
        facts[name] = {"digest": _digest(split, resize), "passed_over": dict(split.passed_over), "shards": named}
        arrays |= {f"{name}.{part}": array for part, array in names_of(split.paths).items()}
        arrays[f"{name}.labels"] = split.labels.astype(np.int32)
        arrays |= {f"{name}.{part}": array for part, array in _places(name, len(split), per_shard, shards).items()}
        checksums += [f"{sha256}  {file}\n" for file, _, sha256 in named]
    (out / CLASSES).write_text("".join(f"{each}\n" for each in splits[0].classes))
    (out / CHECKSUMS).write_text("".join(checksums))
    Listing(facts, arrays).write(out / INDEX)
    for file in [out / _SETTINGS, *(sidecar(out / line.split("  ")[1].strip()) for line in checksums)]:
        file.unlink(missing_ok=True)


def _places(name: str, n: int, per_shard: int, shards: Sequence[Written]) -> dict[str, NDArray[Any]]:
    """Where each sample lies."""
    places: dict[str, NDArray[Any]] = {
        "shard": np.empty(n, np.int32),
        "start": np.empty(n, np.int64),
        "size": np.empty(n, np.int32),
        "crc": np.empty(n, np.uint32),
    }
    for number, samples in enumerate(_samples_of_shards(name, n, per_shard)):
        places["shard"][samples] = number
        places["start"][samples] = shards[number].starts
        places["size"][samples] = shards[number].sizes
        places["crc"][samples] = shards[number].crcs
    return places
