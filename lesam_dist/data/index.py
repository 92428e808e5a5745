"""An index of a large data set of class folders, so that a start reads one file and not a million names.

It is `ROOT/.lesam_index.safetensors`, or where ROOT cannot be written a file in ~/.cache/lesam_dist. It holds while the
folders' times are those of when it was made: a file that comes, goes or is renamed changes its folder's. What a file
holds is not looked at.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.folder import ImageFolder, scan_split
from lesam_dist.data.listing import Listing, Paths, names_of, read_listing

NAME = ".lesam_index.safetensors"
LARGE = 50_000
"""Images from which on a run makes an index: fewer are listed in half a second."""

_SPLITS = ("train", "val")
_AT_ONCE = 32  # questions to a file system that may be far away
_PER_TASK = 1024  # files

Split = tuple[ImageFolder, ImageFolder]


def index_files(root: Path) -> tuple[Path, Path]:
    """Where the index of a data set may be: in its folder, and in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=12).hexdigest()
    return root / NAME, cache / "lesam_dist" / f"index-{name}.safetensors"


def write_index(
    root: Path, train: ImageFolder, val: ImageFolder, sizes: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
) -> Path:
    """Write the index of a data set that has just been listed, to the first of `index_files` that can be written.

    Args:
        root: the data set's folder.
        train: from `scan_split`.
        val: likewise.
        sizes: of the files of both, if they are to be kept.

    Raises:
        OSError: neither can be written.
    """
    facts: dict[str, Any] = {"kind": "class folders", "classes": list(train.classes)}
    arrays: dict[str, NDArray[Any]] = {}
    for i, (name, split) in enumerate(zip(_SPLITS, (train, val), strict=True)):
        facts[name] = {"digest": split.digest, "passed_over": dict(split.passed_over)}
        arrays |= {f"{name}.{part}": array for part, array in names_of(split.paths).items()}
        arrays[f"{name}.labels"] = split.labels.astype(np.int32)
        if sizes is not None:
            arrays[f"{name}.sizes"] = sizes[i]
    arrays["times"] = _times(root, train.classes)
    listing = Listing(facts, arrays)
    beside, cached = index_files(root)
    try:
        listing.write(beside)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    else:
        return beside
    cached.parent.mkdir(parents=True, exist_ok=True)
    listing.write(cached)
    return cached


def find_index(root: Path, *, verify: bool = True) -> Listing | None:
    """The index of a data set, if there is one and it holds.

    Args:
        root: the data set's folder.
        verify: read all of it, to see that it is whole; otherwise only the folders' times are compared.
    """
    for file in index_files(root):
        try:
            listing = read_listing(file)
        except (OSError, ValueError):
            continue
        if listing.facts.get("kind") != "class folders" or (verify and not listing.is_whole()):
            continue
        if np.array_equal(listing.arrays["times"], _times(root, listing.facts["classes"])):
            return listing
    return None


def open_index(root: Path, listing: Listing) -> Split:
    """Both splits as `scan_split` lists them; of the index only what is looked at is read."""
    classes = tuple(listing.facts["classes"])
    return (
        _split(root, "train", classes, listing),
        _split(root, "val", classes, listing),
    )


def _split(root: Path, name: str, classes: tuple[str, ...], listing: Listing) -> ImageFolder:
    names, ends, labels = (listing.arrays[f"{name}.{part}"] for part in ("names", "ends", "labels"))
    facts = listing.facts[name]
    paths = Paths(str(root / name / "_")[:-1], classes, labels, names, ends)
    return ImageFolder(root, classes, paths, labels, facts["passed_over"], known_digest=facts["digest"])


def scan_both(root: Path) -> Split:
    """List both splits, reading the folders."""
    train = scan_split(root, "train")
    return train, scan_split(root, "val", train.classes)


def _times(root: Path, classes: tuple[str, ...] | list[str]) -> NDArray[np.int64]:
    """When each folder of the data set was changed, in nanoseconds; -1 where there is none."""
    folders = [str(root / split) for split in _SPLITS]
    folders += [os.path.join(folder, name) for folder in folders for name in classes]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return np.fromiter(pool.map(_time, folders), np.int64, len(folders))


def _time(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def sizes_of(split: ImageFolder, progress: Callable[[int], object] = lambda _: None) -> NDArray[np.int64]:
    """Bytes of each file; -1 of one that is not there. ``progress`` is told how many are known."""
    found = np.empty(len(split), np.int64)
    begins = range(0, len(split), _PER_TASK)
    parts = (split.paths[begin : begin + _PER_TASK] for begin in begins)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for begin, sizes in zip(begins, pool.map(_sizes, parts), strict=True):
            found[begin : begin + len(sizes)] = sizes
            progress(begin + len(sizes))
    return found


def _sizes(paths: Sequence[str]) -> list[int]:
    return [_size(path) for path in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
