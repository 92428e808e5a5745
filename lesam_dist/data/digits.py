"""A real image dataset that needs no download: scikit-learn's 1797 handwritten digits, as JPEG files.

``python -m lesam_dist.data.digits [ROOT]`` writes it (default: data/digits).

A noisy variant is hard enough to tell methods apart in minutes: 30 training images of each digit, of which 6 lie in
the folder of another one, and the same validation images, rightly labelled.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from lesam_dist.data.folder import scan_split
from lesam_dist.errors import UserError

SIDE = 32  # pixels; the scans are 8 x 8
TOTAL = 1797
VAL_FRACTION, HELD_OUT = 0.2, 359  # of each digit, rounded, and of all
NOISY_KEPT, NOISY_WRONG = 30, 6  # training images of each digit in the noisy variant, and how many of them lie
WRONG_LABELS = "wrong_labels.csv"  # in the noisy variant's root: which ones


def prepare_digits(root: Path, seed: int = 0, *, noisy: bool = False) -> Path:
    """Write ``root/{train,val}/{0..9}/NNNN.JPEG`` unless it is there; NNNN is the digit's number in sklearn.

    Grey JPEGs of 32 x 32 pixels (bicubic, quality 95). A fifth of each class is for validation, the same
    images for the same ``seed``. The files are written aside and then moved in one rename, so that ``root``
    is complete if it exists; processes that start at the same time do not disturb each other.

    Args:
        root: the folder to write.
        seed: of the split, and of the noise.
        noisy: keep 300 training images, 60 of them in the folder of a wrong class, drawn uniformly from the other
            nine; ``root/wrong_labels.csv`` says which. The validation images are the same.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` cannot be written, or holds something else.
    """
    root = Path(root).expanduser()
    if holds_digits(root, noisy=noisy):
        return root
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"'{root}' exists and is not the {'noisy ' if noisy else ''}digits dataset ({_what_is_there(root)}): "
            "choose another folder, or remove this one. To train on your own images, leave out the digits: "
            "--data.builtin null."
        )
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the digits dataset to '{root}' ({error.strerror}): choose a folder that you may write."
        ) from error
    try:
        _write(aside, seed)
        if noisy:
            _add_noise(aside, seed)
        aside.chmod(0o755)  # mkdtemp's is for its owner alone
        aside.rename(root)
    except OSError as error:
        if not holds_digits(root, noisy=noisy):  # else another process was faster
            raise UserError(
                f"cannot write the digits dataset to '{root}' ({error.strerror}): free some space, or choose "
                "a folder that you may write."
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def holds_digits(root: Path, *, noisy: bool) -> bool:
    """Whether this folder is what `prepare_digits` writes, for some seed, by its files' names."""
    try:
        train, val = scan_split(root, "train"), scan_split(root, "val")
    except UserError:
        return False
    names = {Path(path).name for split in (train, val) for path in split.paths}
    return (
        train.classes == val.classes == tuple("0123456789")
        and (len(train), len(val)) == (10 * NOISY_KEPT if noisy else TOTAL - HELD_OUT, HELD_OUT)
        and len(names) == len(train) + len(val)
        and names <= {_file_name(number) for number in range(TOTAL)}
        and (root / WRONG_LABELS).exists() == noisy
    )


def _what_is_there(root: Path) -> str:
    for noisy, name in ((False, "the one without noise"), (True, "the noisy one")):
        if holds_digits(root, noisy=noisy):
            return name
    if root.is_dir() and not ((root / "train").is_dir() and (root / "val").is_dir()):
        return "no train/ and val/ in it"
    return "other images, or not all of them" if root.is_dir() else "a file"


def _file_name(number: int) -> str:
    return f"{number:04d}.JPEG"


def _write(folder: Path, seed: int) -> None:
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    pixels = np.round(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng(seed)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        held_out = round(VAL_FRACTION * len(members))
        for split, numbers in (("val", members[:held_out]), ("train", members[held_out:])):
            target = folder / split / str(digit)
            target.mkdir(parents=True)
            for number in numbers:
                image = Image.fromarray(pixels[number]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                image.save(target / _file_name(number), quality=95)


def _add_noise(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))  # not the stream of the split
    files = [sorted((folder / "train" / str(digit)).iterdir()) for digit in range(10)]  # before any is moved
    lines = ["number,digit,label"]
    for digit, images in enumerate(files):
        order = rng.permutation(len(images))
        for i in order[NOISY_KEPT:]:
            images[i].unlink()
        for i in order[:NOISY_WRONG]:
            label = (digit + int(rng.integers(1, 10))) % 10
            images[i].rename(folder / "train" / str(label) / images[i].name)
            lines.append(f"{images[i].stem},{digit},{label}")
    (folder / WRONG_LABELS).write_text("\n".join(lines) + "\n")


def main(arguments: list[str]) -> int:
    try:
        root = prepare_digits(Path(arguments[0] if arguments else "data/digits"))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{root}: 1797 digits in train/ and val/, 32 x 32 pixels, 10 classes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
