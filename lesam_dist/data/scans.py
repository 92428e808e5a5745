"""Small real data sets of scanned digits that need no download: written once, as class folders.

A noisy variant is harder, so that methods differ by more in minutes: it has fewer training images, a fifth of which lie
in the folder of another digit, and the same validation images, rightly labelled.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesam_dist.data.folder import scan_split
from lesam_dist.errors import UserError

VAL_FRACTION = 0.2  # of each digit, rounded
WRONG_LABELS = "wrong_labels.csv"  # in the noisy variant's root: which ones


@dataclass(frozen=True)
class Scans:
    """A data set of grey images of digits.

    Attributes:
        name: in messages.
        source: whose they are, likewise.
        total: number of images.
        held_out: of them, for validation.
        noisy_kept: training images of each digit in the noisy variant.
        noisy_wrong: how many of them lie.
        suffix: of the files, which says their format.
        read: gives pixels (total, side, side) and labels (total,).
    """

    name: str
    source: str
    total: int
    held_out: int
    noisy_kept: int
    noisy_wrong: int
    suffix: str
    read: Callable[[], tuple[NDArray[np.uint8], NDArray[np.int64]]]

    def file_name(self, number: int) -> str:
        """Of an image by its number in the source."""
        return f"{number:04d}{self.suffix}"


def prepare(scans: Scans, root: Path, seed: int = 0, *, noisy: bool = False) -> Path:
    """Write ``root/{train,val}/{0..9}/NNNN.SUFFIX`` unless it is there; NNNN is the image's number in its source.

    A fifth of each class is for validation, the same images for the same ``seed``. The files are written aside and then
    moved in one rename, so that ``root`` is complete if it exists; processes that start at the same time do not disturb
    each other.

    Args:
        scans: the data set.
        root: the folder to write.
        seed: of the split, and of the noise.
        noisy: keep ``noisy_kept`` training images of each digit, ``noisy_wrong`` of them in the folder of a wrong
            class, drawn uniformly from the other nine; ``root/wrong_labels.csv`` says which. The validation images are
            the same.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` cannot be written, or holds something else; the source is missing.
    """
    root = Path(root).expanduser()

    def fill(folder: Path) -> None:
        _write(scans, folder, seed, *scans.read())
        if noisy:
            _add_noise(scans, folder, seed)

    return write_whole(
        root,
        scans.name,
        is_there=lambda: holds(scans, root, noisy=noisy),
        fill=fill,
        found=lambda: _what_is_there(scans, root),
        kind="noisy " if noisy else "",
    )


def write_whole(
    root: Path,
    name: str,
    *,
    is_there: Callable[[], bool],
    fill: Callable[[Path], None],
    found: Callable[[], str],
    kind: str = "",
) -> Path:
    """Have a built-in data set in ``root``: written aside unless it is there, and moved there in one rename.

    Args:
        root: its folder.
        name: of the data set, as in ``data.builtin`` but for ``kind``, which comes before it in messages.
        is_there: whether ``root`` holds it.
        fill: writes it into a folder.
        found: what ``root`` holds otherwise, in words.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` cannot be written, or holds something else; or as ``fill``.
    """
    root = Path(root).expanduser()
    if is_there():
        return root
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"'{root}' exists and is not the {kind}{name} dataset ({found()}): choose another folder, or remove this "
            f"one. To train on your own images, leave out {name}: --data.builtin null."
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the {name} dataset to '{root}' ({error.strerror}): choose a folder that you may write."
        ) from error
    try:
        fill(aside)
        aside.chmod(0o755)  # mkdtemp's is for its owner alone
        aside.rename(root)
    except OSError as error:
        if not is_there():  # else another process was faster
            raise UserError(
                f"cannot write the {name} dataset to '{root}' ({error.strerror}): free some space, or choose a folder "
                "that you may write."
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def holds(scans: Scans, root: Path, *, noisy: bool) -> bool:
    """Whether this folder is what `prepare` writes, for some seed, by its files' names."""
    try:
        train, val = scan_split(root, "train"), scan_split(root, "val")
    except UserError:
        return False
    names = {Path(path).name for split in (train, val) for path in split.paths}
    return (
        train.classes == val.classes == tuple("0123456789")
        and (len(train), len(val)) == (10 * scans.noisy_kept if noisy else scans.total - scans.held_out, scans.held_out)
        and len(names) == len(train) + len(val)
        and names <= {scans.file_name(number) for number in range(scans.total)}
        and (root / WRONG_LABELS).exists() == noisy
    )


def _what_is_there(scans: Scans, root: Path) -> str:
    for noisy, name in ((False, "the one without noise"), (True, "the noisy one")):
        if holds(scans, root, noisy=noisy):
            return name
    if root.is_dir() and not ((root / "train").is_dir() and (root / "val").is_dir()):
        return "no train/ and val/ in it"
    return "other images, or not all of them" if root.is_dir() else "a file"


def _write(scans: Scans, folder: Path, seed: int, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    rng = np.random.default_rng(seed)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        held_out = round(VAL_FRACTION * len(members))
        for split, numbers in (("val", members[:held_out]), ("train", members[held_out:])):
            target = folder / split / str(digit)
            target.mkdir(parents=True)
            for number in numbers:
                Image.fromarray(pixels[number]).save(target / scans.file_name(number), quality=95)


def _add_noise(scans: Scans, folder: Path, seed: int) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))  # not the stream of the split
    files = [sorted((folder / "train" / str(digit)).iterdir()) for digit in range(10)]  # before any is moved
    lines = ["number,digit,label"]
    for digit, images in enumerate(files):
        order = rng.permutation(len(images))
        for i in order[scans.noisy_kept :]:
            images[i].unlink()
        for i in order[: scans.noisy_wrong]:
            label = (digit + int(rng.integers(1, 10))) % 10
            images[i].rename(folder / "train" / str(label) / images[i].name)
            lines.append(f"{images[i].stem},{digit},{label}")
    (folder / WRONG_LABELS).write_text("\n".join(lines) + "\n")
