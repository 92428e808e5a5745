"""Scanned digits whose colour tells which file they are, whatever was cropped, flipped or resized.

Red is the digit. Green and blue are one constant each over the whole image, and together the file's number: no crop,
flip or resize changes them. So what a step consumed is read from its batch, and not from the code that planned it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lesam_dist.config.schema import DataConfig

SIDE, CLASSES = 12, 3
TRAIN, VAL = 48, 16  # images, of all classes
_LEVELS, _GAP = 32, 8  # of a colour: values 8 apart, so that no rounding can confuse two
UNKNOWN = -1


def write_images(root: Path, seed: int = 0) -> None:
    """``root/{train,val}/CLASS/NNNN.png``: a name has the number in the colours. Validation follows training."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(n_class=CLASSES, return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(labels))[: TRAIN + VAL]
    for number, scan in enumerate(chosen):
        red = Image.fromarray(np.round(scans[scan].reshape(8, 8) * (255 / 16)).astype(np.uint8)).resize((SIDE, SIDE))
        colours = [value * _GAP + _GAP // 2 for value in divmod(number, _LEVELS)]
        channels = [red, *(Image.new("L", (SIDE, SIDE), value) for value in colours)]
        folder = root / ("train" if number < TRAIN else "val") / str(labels[scan])
        folder.mkdir(parents=True, exist_ok=True)
        Image.merge("RGB", channels).save(folder / f"{number:04d}.png")


def numbers_of(images: Tensor, data: DataConfig) -> list[int]:
    """The files' numbers of a normalised batch (B, 3, S, S); UNKNOWN where the colours are not those of any."""
    mean, std = (torch.tensor(values[1:]).view(2, 1, 1) for values in (data.mean, data.std))
    colours = (images[:, 1:].detach().float().cpu() * std + mean) * 255
    levels = (colours / _GAP).floor().long()
    flat = levels.flatten(2)
    whole = (flat.amax(2) == flat.amin(2)).all(1)
    numbers = levels[:, 0, 0, 0] * _LEVELS + levels[:, 1, 0, 0]
    return torch.where(whole, numbers, UNKNOWN).tolist()  # type: ignore[no-any-return]
