"""Order and division among ranks: complete, disjoint, and the same for any number of processes."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lesam_dist.data import ImageFolder, Transform, epoch_order, rank_batches
from lesam_dist.data.cifar_transform import CifarTransform
from lesam_dist.data.cifar_transform import draw as draw_cifar
from lesam_dist.data.plan import Plan
from lesam_dist.data.transform import ATTEMPTS, crop_window, draw


def test_epoch_order(rng: np.random.Generator, seed: int) -> None:
    n = int(rng.integers(100, 1000))
    orders = {(s, e): epoch_order(n, seed=s, epoch=e, shuffle=True) for s in (seed, seed + 1) for e in range(3)}
    for order in orders.values():
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(n))
    assert len({order.tobytes() for order in orders.values()}) == len(orders)
    assert np.array_equal(orders[seed, 2], epoch_order(n, seed=seed, epoch=2, shuffle=True))
    assert np.array_equal(epoch_order(n, seed=seed, epoch=2, shuffle=False), np.arange(n))
    assert len(epoch_order(0, seed=seed, epoch=0, shuffle=True)) == 0


def test_training_batches_do_not_depend_on_the_number_of_ranks(rng: np.random.Generator, seed: int) -> None:
    batch_size, n = 60, int(rng.integers(200, 1000))
    order = epoch_order(n, seed=seed, epoch=3, shuffle=True)
    for world in (1, 2, 3, 5):
        ranks = [
            rank_batches(order, batch_size=batch_size, rank=rank, world_size=world, train=True) for rank in range(world)
        ]
        assert {len(batches) for batches in ranks} == {n // batch_size}
        assert {len(batch) for batches in ranks for batch in batches} == {batch_size // world}
        for i, parts in enumerate(zip(*ranks, strict=True)):
            assert np.array_equal(np.concatenate(parts), order[i * batch_size : (i + 1) * batch_size])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [0, 1, 4, 59, 60, 61])
def test_evaluation_reads_every_sample_once(n: int, world: int) -> None:
    parts = [
        rank_batches(np.arange(n), batch_size=7, rank=rank, world_size=world, train=False) for rank in range(world)
    ]
    seen = [batch for batches in parts for batch in batches]
    assert all(1 <= len(batch) <= 7 for batch in seen)
    assert np.array_equal(np.concatenate([np.empty(0, int), *seen]), np.arange(n))
    sizes = [sum(map(len, batches)) for batches in parts]
    assert max(sizes) - min(sizes) <= 1


def test_draws_are_within_bounds_and_independent(seed: int) -> None:
    transform = Transform(random_area=(0.3, 0.6), random_aspect_ratio=(0.5, 3.0))
    draws = draw(transform, range(10_000, 15_000), seed=seed, epoch=1)
    assert draws.area.shape == draws.ratio.shape == (5000, ATTEMPTS)
    assert 0.3 <= draws.area.min() < draws.area.max() <= 0.6
    assert 0.5 - 1e-12 <= draws.ratio.min() < draws.ratio.max() <= 3 + 1e-12
    # Means of 5000 draws: 6 standard deviations of slack.
    assert abs(draws.flip.mean() - 0.5) < 6 * 0.5 / 5000**0.5
    assert np.abs(draws.position.mean(axis=0) - 0.5).max() < 6 * 12**-0.5 / 5000**0.5
    assert abs(np.log(draws.ratio).mean() - np.log(1.5) / 2) < 6 * np.log(6) / (12 * 50000) ** 0.5
    again = draw(transform, range(10_000, 15_000), seed=seed, epoch=1)
    others = [
        draw(transform, range(first, first + 5000), seed=s, epoch=e)
        for s, e, first in ((seed, 1, 15_000), (seed, 2, 10_000), (seed, 2, 5000), (seed + 1, 1, 10_000))
    ]
    assert np.array_equal(draws.area, again.area)
    for other in others:
        assert abs(np.corrcoef(draws.area[:, 0], other.area[:, 0])[0, 1]) < 6 / 5000**0.5
    columns = np.hstack([draws.area, draws.ratio, draws.position, draws.flip[:, None]])
    assert np.abs(np.corrcoef(columns.T) - np.eye(2 * ATTEMPTS + 3)).max() < 6 / 5000**0.5
    assert not draw(Transform(horizontal_flip=False), range(99), seed=seed, epoch=0).flip.any()


def test_draws_of_a_part_are_that_part_of_the_draws(rng: np.random.Generator, seed: int) -> None:
    """However the positions of an epoch are cut into batches and ranks."""
    n = 500
    cuts = [0, *sorted(int(cut) for cut in rng.integers(0, n, 7)), n]
    parts = [range(a, b) for a, b in itertools.pairwise(cuts)]
    transform = Transform(auto_augment="trivialaugment", random_erasing=0.5)
    whole = draw(transform, range(n), seed=seed, epoch=3)
    for column, *pieces in zip(whole, *(draw(transform, part, seed=seed, epoch=3) for part in parts), strict=True):
        assert np.array_equal(column, np.concatenate(pieces))
    cifar = CifarTransform(cutout=8, cutout_probability=0.5)
    drawn = draw_cifar(cifar, range(n), seed=seed, epoch=3)
    for column, *pieces in zip(drawn, *(draw_cifar(cifar, part, seed=seed, epoch=3) for part in parts), strict=True):
        assert np.array_equal(column, np.concatenate(pieces))


def test_a_rank_draws_for_its_own_samples_alone(seed: int) -> None:
    """Of a global batch of 65,536, one image: the 12 MB of all crops are not made, only the 0.5 MB of the order."""
    n = 2**16
    folder = ImageFolder(Path(), ("only",), ("x",) * n, np.zeros(n, np.int64))
    plan = Plan(folder, True, n, seed, n - 1, n, Transform())
    tracemalloc.start()
    try:
        [batch] = plan.epoch(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch.draws is not None
    assert {len(column) for column in batch.draws} == {1}
    assert peak < 2e6


def test_crop_window_is_random_resized_crop(rng: np.random.Generator, seed: int) -> None:
    """Inside the image, the drawn area and aspect to within rounding, and torchvision's frequencies."""
    bounds = (3 / 4, 4 / 3)
    height, width = (int(v) for v in rng.integers(300, 900, 2))
    draws = draw(Transform(), range(4000), seed=seed, epoch=0)
    windows = np.array(
        [crop_window(height, width, *row, bounds) for row in zip(draws.area, draws.ratio, draws.position, strict=True)]
    )
    top, left, h, w = windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert (w / h).min() > 0.75 - 0.02
    assert (w / h).max() < 4 / 3 + 0.02

    transforms = pytest.importorskip("torchvision.transforms.v2")
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    theirs = transforms.RandomResizedCrop(8)
    blank = torch.empty(3, height, width, device="meta")
    drawn = [theirs.make_params([blank]) for _ in range(4000)]
    for ours, name in zip((top, left, h, w), ("top", "left", "height", "width"), strict=True):
        other = np.array([params[name] for params in drawn])
        slack = 6 * np.hypot(ours.std(), other.std()) / 4000**0.5
        assert abs(ours.mean() - other.mean()) < slack, name


def test_crop_window_of_a_thin_image(rng: np.random.Generator) -> None:
    """No candidate fits: the largest crop within the aspect bounds, at a random place."""
    area, ratio = np.ones(ATTEMPTS), np.ones(ATTEMPTS)
    position = rng.random(2)
    top, left, h, w = crop_window(30, 1000, area, ratio, position, (3 / 4, 4 / 3))
    assert (top, h, w) == (0, 30, 40)
    assert left == int(position[1] * 961)
    assert crop_window(1, 1, area * 0.1, ratio, position, (3 / 4, 4 / 3)) == (0, 0, 1, 1)
