"""Before anything imports triton: without a GPU the kernels run in Triton's interpreter (read once, at decoration)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

CLASSES = ("0", "1", "2")
TRAIN, VAL = 20, 7  # images per class of the fixture `images`


@pytest.fixture
def seed() -> int:
    """A fresh seed per test, printed so that a failure can be repeated with SEED=n."""
    value = int(os.environ.get("SEED", torch.seed() % 2**31))
    torch.manual_seed(value)
    print(f"SEED={value}")
    return value


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/train and ROOT/val with 3 classes of scanned digits."""
    from lesam_dist.data.digits import prepare_digits

    full, root = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("images")
    prepare_digits(full)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for path in sorted((full / split / name).iterdir())[:count]:
                shutil.copy(path, root / split / name)
    return root
