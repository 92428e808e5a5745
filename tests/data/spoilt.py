"""Images to spoil: what the tests of bad files, and of what ends a run of them, begin with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lesam_dist.data import ImageFolder, Loader, scan_split
from lesam_dist.data.bad_files import BadFiles

Load = Callable[..., Loader]
Batches = list[tuple[Tensor, Tensor]]

N, BATCH = 62, 12  # so that an epoch leaves two images out
KINDS = ("truncated", "cut late", "garbage", "header", "empty", "text", "truncated PNG", "folder", "dangling")


def write_images(root: Path, rng: np.random.Generator) -> ImageFolder:
    """Noise of 60 x 70 pixels, whose crops are as good as their names: no two are alike."""
    for i in range(N):
        path = root / "train" / "abc"[i % 3] / f"{i:02}.{'png' if i % 4 == 0 else 'JPEG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(path)
    return scan_split(root, "train")


def spoil(path: Path, kind: str, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(
            {
                "truncated": data[: len(data) * 2 // 3],
                "cut late": data[: len(data) * 9 // 10],
                "garbage": rng.bytes(3000),
                "header": data[:640],
                "empty": b"",
                "text": b"404: not found\n" * 9,
                "truncated PNG": data[: len(data) // 2],
            }[kind]
        )


def spoil_some(folder: ImageFolder, rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> list[int]:
    """One file of each kind, at random places."""
    jpegs, pngs = ([i for i, path in enumerate(folder.paths) if path.endswith(end)] for end in ("JPEG", "png"))
    chosen = {int(i) for i in rng.choice(jpegs, len(kinds), replace=False)}
    bad = []
    for kind, i in zip(kinds, sorted(chosen), strict=True):
        sample = int(rng.choice(pngs)) if kind == "truncated PNG" else i
        spoil(Path(folder.paths[sample]), kind, rng)
        bad.append(sample)
    return bad


def read(loader: Loader, epochs: int) -> Batches:
    return [*itertools.chain(*map(loader.epoch, range(epochs)))]


def same(a: Batches, b: Batches) -> bool:
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


def plain(load: Load, backend: str) -> Load:
    return lambda folder: load(folder, backend, batch_size=BATCH)


class Said(list[str]):
    """What was printed."""

    def __call__(self, line: str) -> None:
        self.append(line)


LoadNoise = Callable[..., tuple[Loader, BadFiles, Said]]
