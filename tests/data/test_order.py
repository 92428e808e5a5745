"""Order and division among ranks: complete, disjoint, and the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from lesam_dist.data import Transform, epoch_order, rank_batches
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
    draws = draw(transform, 5000, seed=seed, epoch=1, batch=2)
    assert draws.area.shape == draws.ratio.shape == (5000, ATTEMPTS)
    assert 0.3 <= draws.area.min() < draws.area.max() <= 0.6
    assert 0.5 - 1e-12 <= draws.ratio.min() < draws.ratio.max() <= 3 + 1e-12
    # Means of 5000 draws: 6 standard deviations of slack.
    assert abs(draws.flip.mean() - 0.5) < 6 * 0.5 / 5000**0.5
    assert np.abs(draws.position.mean(axis=0) - 0.5).max() < 6 * 12**-0.5 / 5000**0.5
    assert abs(np.log(draws.ratio).mean() - np.log(1.5) / 2) < 6 * np.log(6) / (12 * 50000) ** 0.5
    again = draw(transform, 5000, seed=seed, epoch=1, batch=2)
    others = [draw(transform, 5000, seed=seed, epoch=e, batch=b) for e, b in ((1, 3), (2, 2), (2, 1))]
    assert np.array_equal(draws.area, again.area)
    for other in others:
        assert abs(np.corrcoef(draws.area[:, 0], other.area[:, 0])[0, 1]) < 6 / 5000**0.5
    assert not draw(Transform(horizontal_flip=False), 99, seed=seed, epoch=0, batch=0).flip.any()


def test_crop_window_is_random_resized_crop(rng: np.random.Generator, seed: int) -> None:
    """Inside the image, the drawn area and aspect to within rounding, and torchvision's frequencies."""
    bounds = (3 / 4, 4 / 3)
    height, width = (int(v) for v in rng.integers(300, 900, 2))
    draws = draw(Transform(), 4000, seed=seed, epoch=0, batch=0)
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
