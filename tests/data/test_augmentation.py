"""RandAugment, TrivialAugment, erasing, repeats and sizes by epoch: torchvision's, and the same in both backends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from lesam_dist.data import ImageFolder, Loader, Transform, epoch_order, scan_split
from lesam_dist.data.auto_augment import BINS, LEVELS, OPERATIONS, policy_of
from lesam_dist.data.erasing import NUMBERS, erase, holes
from lesam_dist.data.plan import Plan
from lesam_dist.data.torchvision_augment import augment
from lesam_dist.data.transform import draw
from lesam_dist.errors import UserError

Load = Callable[..., Loader]
POLICIES = ("randaugment", "trivialaugment")
ACROSS = {
    "color": 3,  # DALI rounds, torchvision rounds down, and both do so twice: also of what is blended
    "contrast": 2,
    "equalize": 64,  # OpenCV's formula in DALI, Pillow's in torchvision
}
"""Largest difference between the backends in grey levels of 255, where it is more than 1, by rounding."""


def photos(side: int, count: int = 2) -> list[Tensor]:
    """Natural images, uint8 (3, side, side)."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(image).resize((side, side)) for image in load_sample_images().images]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in images[:count]]


# ---- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_magnitudes_are_torchvisions(name: str) -> None:
    """Every operation at every level, on an image of another side than 224."""
    side, policy = 160, policy_of(name, 2, 9)
    space = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}[name]._AUGMENTATION_SPACE
    for operation, (torchvisions, (magnitudes, signed)) in zip(OPERATIONS, space.items(), strict=True):
        assert operation.replace("_", "") == torchvisions.lower()
        values = magnitudes(BINS, side, side)
        if values is None:
            assert {policy.magnitude(operation, level, side) for level in range(LEVELS)} == {0.0}
            continue
        for level, value in enumerate([*values, *(-values if signed else values)]):
            expected = int(value) if operation.startswith("translate") else float(value)
            # torchvision's table is in float32.
            assert policy.magnitude(operation, level, side) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_choices(seed: int) -> None:
    """Uniform over operations, magnitudes, signs; a function of (seed, epoch, position); crops stay what they are."""
    n = 6200
    plain = draw(Transform(), range(n), seed=seed, epoch=3)
    for name, count in (("randaugment", 3), ("trivialaugment", 1)):
        transform = Transform(auto_augment=name, randaugment_ops=3, randaugment_magnitude=7)
        draws = draw(transform, range(n), seed=seed, epoch=3)
        assert draws.operation.shape == draws.level.shape == (n, count)
        for mine, without in zip(draws[:5], plain[:5], strict=True):
            assert np.array_equal(mine, without)
        some = draw(transform, range(100, 130), seed=seed, epoch=3)
        assert np.array_equal(some.operation, draws.operation[100:130])
        assert np.array_equal(some.level, draws.level[100:130])
        assert not np.array_equal(draw(transform, range(n), seed=seed, epoch=4).operation, draws.operation)
        share = np.bincount(draws.operation.ravel(), minlength=14) / draws.operation.size
        assert np.abs(share - 1 / 14).max() < 5 * (1 / 14 / draws.operation.size) ** 0.5
        signed = np.isin(draws.operation, range(1, 10))
        negative = draws.level >= BINS
        assert not negative[~signed].any()
        assert abs(negative[signed].mean() - 0.5) < 5 * 0.5 / signed.sum() ** 0.5
        if name == "randaugment":
            assert set((draws.level % BINS).ravel().tolist()) == {7}
        else:
            counts = np.bincount((draws.level % BINS).ravel(), minlength=BINS) / n
            assert np.abs(counts - 1 / BINS).max() < 5 * (1 / BINS / n) ** 0.5


# ---- what is done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_operations_are_torchvisions(name: str, seed: int) -> None:
    """Bit for bit what torchvision's transform makes of the same choice, one operation and three in a row."""
    policy, side = policy_of(name, 3, 9), 48
    reference = v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    [photo] = photos(side, 1)
    rng = np.random.default_rng(seed)
    choices = [([k], [int(rng.integers(LEVELS))]) for k in range(14) for _ in range(2)]
    choices += [(rng.integers(14, size=3).tolist(), rng.integers(LEVELS, size=3).tolist()) for _ in range(5)]
    for operations, levels in choices:
        expected = photo
        for k, level in zip(operations, levels, strict=True):
            name_there = list(reference._AUGMENTATION_SPACE)[k]
            magnitude = policy.magnitude(OPERATIONS[k], level, side)
            expected = reference._apply_image_or_video_transform(
                expected, name_there, magnitude, interpolation=reference.interpolation, fill=reference._fill
            )
        assert torch.equal(augment(photo, policy, operations, levels), expected)


@pytest.mark.parametrize("name", POLICIES)
def test_backends_agree_on_each_operation(name: str, seed: int) -> None:
    """On photographs, all operations at random levels and both extremes, as docs/augmentation.md has it."""
    dali = pytest.importorskip("nvidia.dali")
    from lesam_dist.data.dali_augment import OPERATION_INPUTS, augment_graph, operation_inputs

    side, policy, rng = 64, policy_of(name, 1, 9), np.random.default_rng(seed)
    levels = [0, BINS - 1, LEVELS - 1, *rng.integers(LEVELS, size=2).tolist()]
    cases = [(photo, k, level) for photo in photos(side) for k in range(14) for level in levels]
    images, operations, at = zip(*cases, strict=True)
    draws = draw(Transform(image_size=side), range(len(cases)), seed=seed, epoch=0)
    draws = draws._replace(operation=np.int32(operations)[:, None], level=np.int32(at)[:, None])
    inputs = ([image.permute(1, 2, 0).contiguous().numpy() for image in images], *operation_inputs(policy, draws))
    kinds, dims = zip(*OPERATION_INPUTS, strict=True)

    @dali.pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        image, *choice = dali.fn.external_source(
            lambda: inputs,
            num_outputs=4,
            dtype=[dali.types.UINT8, *kinds],
            ndim=[3, *dims],
            layout=["HWC", "", "", ""],
        )
        return augment_graph(image, policy, *choice)

    pipeline = graph(batch_size=len(cases), num_threads=1, device_id=None, prefetch_queue_depth=1)
    [output] = pipeline.run()
    for (photo, k, level), made in zip(cases, output.as_array(), strict=True):
        expected = augment(photo, policy, [k], [level]).int()
        difference = (torch.from_numpy(made).permute(2, 0, 1).int() - expected).abs()
        if OPERATIONS[k] == "sharpness":  # torchvision leaves the outermost pixels as they are
            difference = difference[:, 1:-1, 1:-1]
        assert difference.max() <= ACROSS.get(OPERATIONS[k], 1), (OPERATIONS[k], level)
        if OPERATIONS[k] in ("identity", "translate_x", "translate_y", "posterize", "solarize"):
            assert difference.max() == 0


def flat(loader: Loader, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def folder_of(root: Path) -> ImageFolder:
    return scan_split(root, "train")


@pytest.fixture
def pictures(
    class_folder: Callable[..., Path], smooth: Callable[[int, int], Image.Image], rng: np.random.Generator
) -> ImageFolder:
    files = {f"{i:02}.png": smooth(*map(int, rng.integers(40, 90, 2))) for i in range(26)}
    return folder_of(class_folder(train={"only": files}))


@pytest.mark.parametrize("world", [1, 2])
def test_loader_augments_as_the_plan_says(
    pictures: ImageFolder, load: Load, backend: str, seed: int, world: int
) -> None:
    """After crop, resize and flip: the images without it, changed as drawn. In epoch 1, of another size, too."""
    transform = {
        "image_size": 40,
        "val_resize": 40,
        "mean": (0, 0, 0),
        "std": (1 / 255,) * 3,
        "sizes": ((0, 40), (1, 24)),
    }
    plain, changed = Transform(**transform), Transform(**transform, auto_augment="randaugment", random_erasing=0.5)
    policy = changed.policy
    assert policy is not None
    for epoch, side in enumerate((40, 24)):
        before, _ = flat(load(pictures, backend, transform=plain, batch_size=12), epoch)
        parts = [
            list(load(pictures, backend, transform=changed, batch_size=12, rank=rank, world_size=world).epoch(epoch))
            for rank in range(world)
        ]
        after = torch.cat([images for batch in zip(*parts, strict=True) for images, _ in batch])
        assert before.shape == after.shape == (24, 3, side, side)
        draws = draw(changed, range(24), seed=seed, epoch=epoch)
        expected = torch.stack(
            [
                augment(image.round().byte(), policy, *choice)
                for image, *choice in zip(before, draws.operation, draws.level, strict=True)
            ]
        ).float()
        erase(expected, draws.hole)
        assert 0 < np.any(draws.hole, axis=1).sum() < 24
        if backend == "torchvision":
            assert torch.equal(after, expected)
            continue
        # Beside those that differ more, two that make a step of one grey level into a large one.
        others = [OPERATIONS.index(name) for name in ("sharpness", "equalize", "solarize", "posterize")]
        near = ~np.isin(draws.operation, others).any(axis=1)
        assert near.sum() >= 3
        assert (after - expected).abs()[torch.from_numpy(near)].max() <= 8  # of two operations, each within ACROSS


# ---- erasing ---------------------------------------------------------------------------------------------------------


def test_holes_are_torchvisions(seed: int) -> None:
    """Probability, place within the image, and moments of area and shape against torchvision's own draws."""
    n, side = 4000, 96
    rectangles = holes(np.random.default_rng(seed).random((n, NUMBERS)), 0.6, side)
    top, left, height, width = rectangles.T
    there = height > 0
    assert abs(there.mean() - 0.6) < 5 * (0.24 / n) ** 0.5
    assert not rectangles[~there].any()
    assert (top + height <= side).all()
    assert (left + width <= side).all()
    transform = v2.RandomErasing(p=1)
    image = torch.zeros(3, side, side)
    theirs = [transform.make_params([image]) for _ in range(n)]
    for mine, its in (
        (height[there], [each["h"] for each in theirs]),
        (width[there], [each["w"] for each in theirs]),
        (top[there], [each["i"] for each in theirs]),
        (left[there], [each["j"] for each in theirs]),
        ((height * width)[there], [each["h"] * each["w"] for each in theirs]),
    ):
        other = np.array(its, dtype=float)
        error = math.hypot(mine.std() / len(mine) ** 0.5, other.std() / n**0.5)
        assert abs(mine.mean() - other.mean()) < 5 * error
        assert mine.std() == pytest.approx(other.std(), rel=0.15)


def test_erase(seed: int) -> None:
    images = torch.randn(6, 3, 20, 20)
    rectangles = np.array([[0, 0, 0, 0], [0, 0, 5, 7], [15, 13, 5, 7], [3, 4, 1, 1], [0, 0, 0, 0], [2, 1, 17, 18]])
    expected = images.clone()
    for image, (top, left, height, width) in zip(expected, rectangles, strict=True):
        image[:, top : top + height, left : left + width] = 0
    erase(images, rectangles)
    assert torch.equal(images, expected)


# ---- repeats ---------------------------------------------------------------------------------------------------------


def test_repeats(pictures: ImageFolder, load: Load, backend: str, seed: int) -> None:
    """Every batch has a third as many images, three times, each time cropped in another way; neighbours differ."""
    transform = Transform(image_size=24, val_resize=24, mean=(0, 0, 0), std=(1, 1, 1))
    plan = Plan(pictures, True, 12, seed, 0, 1, transform, repeats=3)
    batches = list(plan.epoch(2))
    assert len(batches) == len(pictures) // 12 == 2
    order = epoch_order(len(pictures), seed=seed, epoch=2, shuffle=True)
    for i, batch in enumerate(batches):
        distinct = [pictures.paths[j] for j in order[4 * i : 4 * i + 4]]
        assert batch.paths == distinct * 3
        assert batch.positions.tolist() == list(range(12 * i, 12 * i + 12))
        assert batch.draws is not None
        assert len(np.unique(batch.draws.position, axis=0)) == 12
        assert all(a != b for a, b in itertools.pairwise(batch.paths))
    options = {"transform": transform, "batch_size": 12, "repeats": 3}
    whole, _ = flat(load(pictures, backend, **options), 2)
    halves = [list(load(pictures, backend, **options, rank=rank, world_size=2).epoch(2)) for rank in range(2)]
    assert torch.equal(torch.cat([images for pair in zip(*halves, strict=True) for images, _ in pair]), whole)
    assert not torch.equal(whole[:4], whole[4:8])


def test_repeats_are_a_part_of_the_run(pictures: ImageFolder, load: Load) -> None:
    once, twice = (load(pictures, "torchvision", batch_size=12, repeats=repeats) for repeats in (1, 2))
    twice.load_state_dict(twice.state_dict())
    with pytest.raises(UserError, match=r"the number of repeats was 2 in the checkpoint and is 1 now"):
        once.load_state_dict(twice.state_dict())
    old = {name: value for name, value in once.state_dict().items() if name != "repeats"}
    once.load_state_dict(old)
    with pytest.raises(UserError, match=r"the number of repeats was 1 in the checkpoint and is 2 now"):
        twice.load_state_dict(old)
    with pytest.raises(UserError, match="batch size 12 cannot be divided by 5 repeats"):
        load(pictures, "torchvision", batch_size=12, repeats=5)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_by_epoch(pictures: ImageFolder, load: Load, backend: str) -> None:
    """One loader, forth and back; the same images as a loader of that one size makes. Evaluation has its own."""
    sizes = Transform(image_size=24, val_resize=40, val_crop=36, sizes=((0, 16), (2, 20), (3, 32)))
    loader = load(pictures, backend, transform=sizes, batch_size=12)
    for epoch, side in ((0, 16), (3, 32), (1, 16), (2, 20), (7, 32)):
        images, _ = flat(loader, epoch)
        assert images.shape[2:] == (side, side)
        assert torch.equal(
            images, flat(load(pictures, backend, transform=Transform(image_size=side), batch_size=12), epoch)[0]
        )
    val, _ = flat(load(pictures, backend, transform=sizes, batch_size=12, train=False))
    assert torch.equal(val, flat(load(pictures, backend, transform=Transform(36, 40), batch_size=12, train=False))[0])
