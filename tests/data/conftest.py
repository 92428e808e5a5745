"""Fresh random inputs, a dataset of digits, and loaders that close themselves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lesam_dist.data import BACKENDS, ImageFolder, Loader, Transform, build_loader, scan_split
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.digits import prepare_digits
from tests.data.spoilt import BATCH, Load, LoadNoise, Said, write_images


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return str(request.param)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def digits_train(digits: Path) -> ImageFolder:
    return scan_split(digits, "train")


@pytest.fixture(scope="session")
def digits_val(digits: Path, digits_train: ImageFolder) -> ImageFolder:
    return scan_split(digits, "val", digits_train.classes)


@pytest.fixture
def load(seed: int) -> Iterator[Callable[..., Loader]]:
    """``build_loader`` on the CPU, with defaults for what a test does not care about."""
    loaders: list[Loader] = []

    def build(folder: ImageFolder, backend: str, **options: Any) -> Loader:
        options = {
            "train": True,
            "transform": Transform(image_size=24, val_resize=28),
            "batch_size": 120,
            "seed": seed,
            "rank": 0,
            "world_size": 1,
            "device": torch.device("cpu"),
            "workers": 0,
            **options,
        }
        loaders.append(build_loader(folder, backend=backend, **options))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def smooth_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A random RGB image without sharp edges, like a photograph's, so that JPEG keeps it."""
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def smooth(rng: np.random.Generator) -> Callable[[int, int], Image.Image]:
    return lambda height, width: smooth_image(rng, height, width)


@pytest.fixture
def class_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write ``ROOT/split/CLASS/NAME`` and return ROOT: ``class_folder(train={"cat": {name: image}})``.

    A value is a PIL image (encoded as the name's ending says) or the file's bytes.
    """

    def write(**splits: dict[str, dict[str, Any]]) -> Path:
        root = tmp_path / "dataset"
        for split, classes in splits.items():
            for name, files in classes.items():
                folder = root / split / name
                folder.mkdir(parents=True)
                for file, content in files.items():
                    if isinstance(content, bytes):
                        (folder / file).write_bytes(content)
                    else:
                        content.save(folder / file)
        return root

    return write


@pytest.fixture
def noise(tmp_path: Path, rng: np.random.Generator) -> ImageFolder:
    """Images to spoil; a copy of them lies beside, in clean/."""
    noise = write_images(tmp_path / "data", rng)
    shutil.copytree(tmp_path / "data", tmp_path / "clean")
    return noise


@pytest.fixture
def load_noise(load: Load, tmp_path: Path, noise: ImageFolder, backend: str) -> LoadNoise:
    """A loader with a journal, what it knows, and what it says."""

    def build(rank: int = 0, world_size: int = 1, limit: int = 100, run: str = "run", **options: Any) -> Any:
        said = Said()
        bad = BadFiles(
            tmp_path / run / "bad_files", noise.root, rank=rank, world_size=world_size, limit=limit, say=said
        )
        options = {"batch_size": BATCH, "rank": rank, "world_size": world_size, **options}
        return load(noise, backend, bad_files=bad, **options), bad, said

    return build
