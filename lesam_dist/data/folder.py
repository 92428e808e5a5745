"""Find the images of a class-folder dataset: ``ROOT/<split>/<class>/<image>``."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.listing import Paths
from lesam_dist.data.shards import Shards
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError

# What both DALI and Pillow decode.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)


@dataclass(frozen=True)
class ImageFolder:
    """One split of a class-folder dataset; sample ``i`` is ``(paths[i], labels[i])``.

    Attributes:
        root: the dataset's folder, above the split.
        classes: class names in label order: label ``k`` means ``classes[k]``.
        paths: one per sample, sorted by class, then by file name. They name the images also where these lie in shards.
        labels: integers ``(N,)``.
        passed_over: files that are no samples but may have been meant to be: their number by kind.
        skipped: how many images a skip list has left out.
        known_digest: where it is known without reading all paths.
        shards: where the images lie, if these are not files of their own.
        relabelled: whether the labels are others than the folders say.
    """

    root: Path | Url
    classes: tuple[str, ...]
    paths: Sequence[str]
    labels: NDArray[Any]
    passed_over: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    known_digest: str | None = None
    shards: Shards | None = None
    relabelled: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def digest(self) -> str:
        """Of the file names below the root, in order: the dataset may move, but not change. With other labels, of these
        too."""
        names = self.known_digest or self._digest_of_names()
        if not self.relabelled:
            return names
        labels = np.ascontiguousarray(self.labels, dtype="<i8")
        return hashlib.blake2b(names.encode() + labels.tobytes(), digest_size=8).hexdigest()

    def _digest_of_names(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for path in self.paths:
            digest.update(b"/" + os.fsencode(below_root(self.root, path)) + b"\0")
        return digest.hexdigest()

    def without(self, skip: Collection[str], split: str) -> ImageFolder:
        """Without the images of a skip list.

        Args:
            skip: paths below ``root``; of those that are not there nothing is said.
            split: that this is.

        Raises:
            UserError: no image of a class is left for training, or none at all.
        """
        left_out = [i for i, path in enumerate(self.paths) if below_root(self.root, path) in skip] if skip else []
        if not left_out:
            return self
        kept = np.delete(np.arange(len(self)), left_out)
        lost = sorted(set(self.labels.tolist()) - set(self.labels[kept].tolist()))
        if lost and split == "train":
            raise UserError(
                f"data.skip_list leaves out all {np.count_nonzero(self.labels == lost[0])} images of the class "
                f"'{self.classes[lost[0]]}' in '{self.root / split}': mend some of them, or remove the class."
            )
        if not len(kept):
            raise UserError(f"data.skip_list leaves out all images in '{self.root / split}': mend some of them.")
        return replace(self.take(kept), skipped=len(left_out))

    def with_labels(self, labels: NDArray[Any]) -> ImageFolder:
        """The same images with other labels."""
        return replace(self, labels=labels, relabelled=True)

    def take(self, samples: NDArray[np.int64]) -> ImageFolder:
        """Some of its samples alone."""
        paths = self.paths
        paths = paths.take(samples) if isinstance(paths, Paths) else tuple(paths[i] for i in samples.tolist())
        shards = None if self.shards is None else self.shards.take(samples)
        return replace(self, paths=paths, labels=self.labels[samples], shards=shards, known_digest=None)


def below_root(root: Path | Url, path: str) -> str:
    """A path that `scan_split` found, from the root on; ``str(root / below_root(root, path))`` is the path again."""
    return path[len(str(root / "_")) - 1 :]


def scan_split(
    root: Path, split: str, classes: tuple[str, ...] | None = None, skip: Collection[str] = frozenset()
) -> ImageFolder:
    """List ``root/split``. Names starting with a dot are ignored. Files that are no images, and images that do not lie
    directly in the folder of a class, are passed over and counted.

    The order is that of the names' code points, so it is the same on every machine and file system, and the
    labels are those of ``torchvision.datasets.ImageFolder``. Only directories are read, never a file.

    Args:
        root: the dataset's folder.
        split: ``"train"`` or ``"val"``.
        classes: the training split's classes, for any other split: its labels then mean the same. A class
            may be missing here, but none may be new.
        skip: images to leave out, as paths below ``root``; of those that are not there nothing is said.

    Raises:
        UserError: a folder is missing, has no class folders, has an empty one, or has an unknown class; or ``skip``
            leaves no image of a class for training, or none at all.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"the dataset folder '{root}' does not exist: pass the folder that holds {split}/.")
    folder = root / split
    if not folder.is_dir():
        found = ", ".join(name + "/" for name in subfolders(root)) or "no folders"
        raise UserError(
            f"'{root}' has no {split}/ folder (found: {found}): arrange the images as {folder}/CLASS/IMAGE."
        )
    names = subfolders(folder)
    if not names:
        raise UserError(
            f"'{folder}' has no class folders: put the images of each class into a folder of their own, "
            f"as {folder}/CLASS/IMAGE."
        )
    if classes is None:
        classes = tuple(names)
    index = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise UserError(
            f"'{folder}' has {len(unknown)} class folder(s) that the training split has not: "
            f"{_shorten(unknown)}. Remove or rename them, or add the class to the training split."
        )

    passed_over = _outside(folder)
    paths: list[str] = []
    labels = np.empty(len(names), dtype=np.int64)
    counts = np.empty(len(names), dtype=np.int64)
    for i, name in enumerate(names):
        files, others = _images(os.path.join(folder, name))
        passed_over += others
        if not files:
            found = f" (but {_listed(others)})" if others else ""
            raise UserError(
                f"the class folder '{folder / name}' holds no images{found}: add some (they must lie directly in it "
                f"and end in {', '.join(EXTENSIONS)}) or remove the folder."
            )
        paths += files
        labels[i], counts[i] = index[name], len(files)
    return ImageFolder(root, classes, tuple(paths), np.repeat(labels, counts), dict(passed_over)).without(skip, split)


def remarks(train: ImageFolder, val: ImageFolder) -> list[str]:
    """A line for each thing that looks like a mistake in data that can be used all the same."""
    lines = [*overlooked(train, "train"), *overlooked(val, "val")]
    missing = sorted(set(range(len(train.classes))) - set(val.labels.tolist()))
    if missing:
        lines.append(
            f"'{val.root / 'val'}' has no images of {len(missing)} of {len(train.classes)} classes, which are not "
            f"evaluated: {_shorten([train.classes[k] for k in missing])}"
        )
    return lines


def overlooked(folder: ImageFolder, split: str) -> list[str]:
    """A line that says what was passed over in a split, if anything."""
    if not folder.passed_over:
        return []
    return [f"'{folder.root / split}': passed over {_listed(folder.passed_over)}"]


def subfolders(folder: Path) -> list[str]:
    """Names, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _images(folder: str) -> tuple[list[str], Counter[str]]:
    """The images of a class, sorted, and what else is there."""
    files, others = [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                files.append(entry.path)
            elif entry.is_dir():
                others["images in nested folders"] += _count_below(entry.path)
            elif not entry.is_file() and entry.is_symlink():
                others["dangling links"] += 1
            else:
                ending = os.path.splitext(entry.name)[1].lower()
                others[f"{ending} files" if ending else "files without an ending"] += 1
    return sorted(files), +others


def _outside(folder: Path) -> Counter[str]:
    """Images, and links to nothing, that lie beside the class folders."""
    others = Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.is_dir():
                continue
            if not entry.is_file() and entry.is_symlink():
                others["dangling links"] += 1
            elif entry.name.lower().endswith(EXTENSIONS):
                others["images outside class folders"] += 1
    return others


def _count_below(folder: str) -> int:
    return sum(name.lower().endswith(EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _shorten(names: list[str], most: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
