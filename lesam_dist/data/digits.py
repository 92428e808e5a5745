"""A real image dataset that needs no download: scikit-learn's 1797 handwritten digits, as JPEG files.

``python -m lesam_dist.data.digits [ROOT]`` writes it (default: data/digits).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from lesam_dist.errors import UserError

SIDE = 32  # pixels; the scans are 8 x 8
VAL_FRACTION = 0.2


def prepare_digits(root: Path, seed: int = 0) -> Path:
    """Write ``root/{train,val}/{0..9}/NNNN.JPEG`` unless it is there; NNNN is the digit's number in sklearn.

    Grey JPEGs of 32 x 32 pixels (bicubic, quality 95). A fifth of each class is for validation, the same
    images for the same ``seed``. The files are written aside and then moved in one rename, so that ``root``
    is complete if it exists; processes that start at the same time do not disturb each other.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` cannot be written, or holds something else.
    """
    root = Path(root).expanduser()
    if _complete(root):
        return root
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(
            f"'{root}' exists and is not the digits dataset (no train/ and val/ in it): choose another "
            "folder, or remove this one."
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
        aside.chmod(0o755)  # mkdtemp's is for its owner alone
        aside.rename(root)
    except OSError as error:
        if not _complete(root):  # else another process was faster
            raise UserError(
                f"cannot write the digits dataset to '{root}' ({error.strerror}): free some space, or choose "
                "a folder that you may write."
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def _complete(root: Path) -> bool:
    return (root / "train").is_dir() and (root / "val").is_dir()


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
                image.save(target / f"{number:04d}.JPEG", quality=95)


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
