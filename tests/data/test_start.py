"""An epoch may begin at any of its batches: the same bits, no file of the batches before, no sample twice."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lesam_dist.data import ImageFolder, Loader, SyntheticLoader, Transform, scan_split
from lesam_dist.data.cifar import CifarLoader, CifarSplit
from lesam_dist.data.cifar_transform import CifarTransform
from lesam_dist.data.plan import Plan

Load = Callable[..., Loader]


def equal(a: Iterable[tuple[Tensor, Tensor]], b: Iterable[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


@pytest.fixture
def folder(digits_train: ImageFolder, tmp_path: Path) -> ImageFolder:
    """A copy of 130 digits, whose files a test may delete."""
    for path in digits_train.paths[::11][:130]:
        target = tmp_path / "train" / Path(path).parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return scan_split(tmp_path, "train")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_tail_is_that_of_the_epoch_and_opens_nothing_else(
    folder: ImageFolder, backend: str, load: Load, rng: np.random.Generator, seed: int, train: bool, workers: int
) -> None:
    """The files of the batches before are gone by then; the loader was used for another epoch."""
    options = {"train": train, "batch_size": 18, "rank": 1, "world_size": 2, "workers": workers}
    loader = load(folder, backend, **options)
    whole = list(loader.epoch(3))
    plan = Plan(folder, train, 18, seed, 1, 2, Transform())
    paths = [batch.paths for batch in plan.epoch(3)]
    assert len(whole) == len(loader) == len(paths)
    next(loader.epoch(4))
    starts = sorted(int(start) for start in rng.choice(np.arange(1, len(whole)), 2, replace=False))
    for start in (0, *starts, len(whole), len(whole) + 1):
        for path in itertools.chain(*paths[:start]):
            Path(path).unlink(missing_ok=True)
        assert equal(loader.epoch(3, start), whole[start:])
    loader.close()


def test_cifar(seed: int, rng: np.random.Generator) -> None:
    images, labels = rng.integers(0, 256, (101, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 101)
    for train in (True, False):
        loader: Loader = CifarLoader(
            CifarSplit(Path(), tuple("0123456789"), images, labels),
            transform=CifarTransform(cutout=8),
            train=train,
            batch_size=8,
            seed=seed,
            rank=1,
            world_size=2,
            device=torch.device("cpu"),
        )
        whole = list(loader.epoch(2))
        for start in (0, int(rng.integers(1, len(whole))), len(whole)):
            assert equal(loader.epoch(2, start), whole[start:])


def test_synthetic(seed: int, rng: np.random.Generator) -> None:
    """And every batch differs from every other, of another epoch and rank too."""
    loaders = [
        SyntheticLoader(
            num_classes=7, image_size=4, batch_size=5, batches=6, seed=seed, rank=rank, device=torch.device("cpu")
        )
        for rank in (0, 1)
    ]
    epochs = [list(loader.epoch(epoch)) for loader in loaders for epoch in (0, 1)]
    for start in (0, int(rng.integers(1, 6)), 6):
        assert equal(loaders[1].epoch(1, start), epochs[-1][start:])
    assert len({images.numpy().tobytes() for epoch in epochs for images, _ in epoch}) == 24


def test_no_batch_comes_before_the_first(folder: ImageFolder, backend: str, load: Load) -> None:
    with pytest.raises(ValueError, match="start is -1"):
        next(load(folder, backend, batch_size=10).epoch(0, -1))


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_another_number_of_processes_reads_what_was_not_seen(
    folder: ImageFolder, seed: int, rng: np.random.Generator, before: int, after: int
) -> None:
    """By file name: none twice, and all but the last, incomplete global batch."""

    def names(world: int, part: slice) -> list[str]:
        plans = [Plan(folder, True, 12, seed, rank, world, Transform()) for rank in range(world)]
        if part.start:
            batches = [batch for plan in plans for batch in plan.epoch(5, part.start)]
        else:
            batches = [batch for plan in plans for batch in list(plan.epoch(5))[part]]
        return [Path(path).name for batch in batches for path in batch.paths]

    start = int(rng.integers(1, 10))
    seen, rest = names(before, slice(0, start)), names(after, slice(start, None))
    assert len(seen) == 12 * start
    assert sorted(seen + rest) == sorted(names(1, slice(0, None)))
    assert len(set(seen + rest)) == len(seen + rest) == 120
