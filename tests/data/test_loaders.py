"""Both backends, and the synthetic images, read what the plan says, exactly once, and leave all else alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lesam_dist.data import ImageFolder, Loader, SyntheticLoader, Transform, build_loader
from lesam_dist.data.plan import Plan
from tests.data.reading import Load, read, same, take

WHOLE = Transform(image_size=32, val_resize=32, mean=(0, 0, 0), std=(1, 1, 1))  # digits as they are


def test_evaluation_reads_every_file_once(digits_val: ImageFolder, backend: str, load: Load) -> None:
    """Over 1, 2, 3 and 5 ranks, in order, with the pixels of the file that the label belongs to."""
    folder = take(digits_val, 71)
    pixels = np.stack([np.asarray(Image.open(path)) for path in folder.paths])
    for world in (1, 2, 3, 5):
        options = {"train": False, "batch_size": 10, "transform": WHOLE, "world_size": world}
        loaders = [load(folder, backend, rank=rank, **options) for rank in range(world)]
        parts = [read(loader) for loader in loaders]
        images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        assert images.shape == (71, 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.tolist() == folder.labels.tolist()
        assert np.array_equal((255 * images).round().numpy(), np.repeat(pixels[:, None], 3, axis=1))
        for loader, (_, seen) in zip(loaders, parts, strict=True):
            assert len(loader) == -(-len(seen) // 10)


def test_a_rank_may_have_nothing_to_evaluate(digits_val: ImageFolder, backend: str, load: Load) -> None:
    loader = load(take(digits_val, 2), backend, train=False, batch_size=4, rank=0, world_size=3)
    assert len(loader) == 0
    assert list(loader.epoch(0)) == []
    assert list(loader.epoch(1)) == []


def test_training_batches_do_not_depend_on_the_number_of_ranks(
    digits_train: ImageFolder, backend: str, load: Load
) -> None:
    """Not only the samples: also their crops and flips, so the images are the same bits."""
    folder = take(digits_train, 200)
    whole = list(load(folder, backend, batch_size=60).epoch(1))
    assert len(whole) == 3
    for world in (2, 3):
        loaders = [load(folder, backend, batch_size=60, rank=rank, world_size=world) for rank in range(world)]
        assert {len(loader) for loader in loaders} == {3}
        for batch, parts in zip(whole, zip(*(each.epoch(1) for each in loaders), strict=True), strict=True):
            assert {len(labels) for _, labels in parts} == {60 // world}
            images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
            assert same(batch, (images, labels))


def test_labels_match_files(digits_train: ImageFolder, seed: int) -> None:
    plan = Plan(digits_train, True, 100, seed, 0, 1, Transform())
    paths, labels = zip(*((batch.paths, batch.labels) for batch in plan.epoch(2)), strict=True)
    flat = list(itertools.chain(*paths))
    assert [int(Path(path).parent.name) for path in flat] == np.concatenate(labels).tolist()
    assert len(set(flat)) == len(flat) == 1400  # 1438 files, last batch dropped


def test_training_epochs_differ_and_evaluation_epochs_do_not(
    digits_train: ImageFolder, backend: str, load: Load
) -> None:
    folder = take(digits_train, 150)
    train, val = load(folder, backend), load(folder, backend, train=False)
    first, second = read(train, 0), read(train, 1)
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    assert same(read(val, 0), read(val, 1))


def test_a_batch_stays_valid(digits_train: ImageFolder, backend: str, load: Load) -> None:
    loader = load(take(digits_train, 200), backend, batch_size=20)
    kept, copies = [], []
    for images, labels in loader.epoch(0):
        kept.append((images, labels))
        copies.append((images.clone(), labels.clone()))
    loader.close()
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


def test_worker_processes_and_threads_change_nothing(digits_train: ImageFolder, backend: str, load: Load) -> None:
    folder = take(digits_train, 100)
    alone, helped = (load(folder, backend, batch_size=20, workers=workers) for workers in (0, 2))
    next(helped.epoch(0))  # left halfway
    assert same(read(helped, 1), read(alone, 1))


def test_reading_leaves_the_global_random_state_alone(digits_train: ImageFolder, backend: str, load: Load) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(load(take(digits_train, 120), backend))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_synthetic(seed: int) -> None:
    def make(**options: int) -> SyntheticLoader:
        defaults = {
            "num_classes": 7,
            "image_size": 8,
            "batch_size": 50,
            "batches": 3,
            "seed": seed,
            "rank": 0,
        }
        return SyntheticLoader(**{**defaults, **options}, device=torch.device("cpu"))

    loader: Loader = make()
    images, labels = read(loader)
    assert len(loader) == 3
    assert images.shape == (150, 3, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) <= set(range(7))
    assert same(read(make()), (images, labels))
    for other in (read(make(), 1), read(make(rank=1)), read(make(seed=seed + 1))):
        assert not torch.equal(other[0], images)
    loader.load_state_dict(loader.state_dict())
    loader.close()


def test_loaders_have_the_interface(digits_train: ImageFolder, backend: str) -> None:
    loader = build_loader(
        digits_train,
        backend=backend,
        train=True,
        transform=Transform(),
        batch_size=64,
        seed=0,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        workers=0,
    )
    assert len(loader) == 1438 // 64
    loader.close()
    loader.close()  # twice is harmless
