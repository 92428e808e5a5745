"""How images are read here, and whether a folder of them has the shape that runs read."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lesam_dist.doctor.finding import Finding

# As `lesam_dist.data.packed.layout` has them, which cannot be imported where packages of the trainer are missing.
_SPLITS = ("train", "val")
_PACKED = "index.safetensors"


@dataclass(frozen=True)
class Decoder:
    """DALI as it is here: whether it is installed, and why it did not decode a JPEG on the CPU and on the GPU.

    A device that was not tried has None, one that works "".
    """

    installed: bool
    cpu: str | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class Folder:
    """A data set's folder: the classes of each split that is there, those of them without a file, and what is odd."""

    root: Path
    classes: dict[str, tuple[str, ...]]
    empty: tuple[str, ...] = ()
    packed: bool = False


def read_decoder(gpu: bool) -> Decoder:
    """Decode a small JPEG with DALI, by each path that a run would take here."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return Decoder(False)
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 40, 90)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    return Decoder(True, _why_not(jpeg, "cpu"), _why_not(jpeg, "mixed") if gpu else None)


def check_decoder(decoder: Decoder, gpus: int) -> Iterator[Finding]:
    """By what class folders are read."""
    if not decoder.installed:
        text = "DALI is not installed: torchvision reads class folders, on the CPU"
        remedy = 'pip install "lesam-dist[dali]" (CUDA 13) or "lesam-dist[dali-cuda120]"'
        yield Finding("decoding", "warning" if gpus else "ok", text, remedy if gpus else "")
        return
    tried = {"on the CPU": decoder.cpu, "on the GPU": decoder.gpu}
    broken = [f"{where}: {why}" for where, why in tried.items() if why]
    if broken:
        text = f"DALI does not decode {'; '.join(broken)}"
        remedy = "--data.backend torchvision, or --data.dali_decoder cpu where the CPU's works"
        yield Finding("decoding", "problem", text, remedy)
    elif decoder.gpu == "":
        yield Finding("decoding", "ok", "DALI decodes JPEGs on the GPU; --data.dali_decoder cpu works too")
    else:
        yield Finding("decoding", "ok", "DALI decodes class folders on the CPU")


def read_folder(root: Path) -> Folder:
    """List the classes, and look for a file in each; images are not opened."""
    if (root / _PACKED).is_file():
        return Folder(root, {}, packed=True)
    classes = {
        split: tuple(sorted(entry.name for entry in os.scandir(root / split) if entry.is_dir()))
        for split in _SPLITS
        if (root / split).is_dir()
    }
    empty = [
        f"{split}/{name}"
        for split, names in classes.items()
        for name in names
        if not any(entry.is_file() for entry in os.scandir(root / split / name))
    ]
    return Folder(root, classes, tuple(empty))


def check_folder(folder: Folder) -> Iterator[Finding]:
    """Whether a run can read it."""
    if folder.packed:
        yield Finding("data", "ok", f"{folder.root} is packed; lesam-dist pack --verify checks every byte")
        return
    missing = [split for split in _SPLITS if not folder.classes.get(split)]
    if missing:
        text = f"{folder.root} has no classes in {' and '.join(f'{split}/' for split in missing)}"
        yield Finding("data", "problem", text, "put images at DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE")
        return
    train, val = (set(folder.classes[split]) for split in _SPLITS)
    if train != val:
        name = min(train ^ val)
        where = "train/ but not in val/" if name in train else "val/ but not in train/"
        text = f"{len(train ^ val)} classes are in one split alone: '{name}' is in {where}"
        yield Finding("data", "problem", text, "give both splits the same class folders")
    elif folder.empty:
        text = f"{len(folder.empty)} class folders have no file, the first is {folder.empty[0]}"
        yield Finding("data", "problem", text, "fill or remove them")
    else:
        yield Finding("data", "ok", f"{len(train)} classes; lesam-dist scan finds images that cannot be decoded")


def _why_not(jpeg: bytes, device: str) -> str:
    """Why DALI does not decode it there; "" where it does."""
    import numpy as np
    import nvidia.dali

    dali: Any = nvidia.dali  # its type stubs leave out much of what it exports
    encoded = np.frombuffer(jpeg, dtype=np.uint8)
    try:
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0)
        with pipeline:
            files = dali.fn.external_source(source=lambda: [encoded])
            pipeline.set_outputs(dali.fn.decoders.image(files, device=device))
        pipeline.build()
        (images,) = pipeline.run()
        shape = tuple(images[0].shape())
    except Exception as error:  # of a library in C++, whose messages are long
        return " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return "" if shape == (48, 64, 3) else f"it gives {shape} for an image of (48, 64, 3)"
