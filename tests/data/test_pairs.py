"""Batches in pairs: the first as any loader's, the second rebalanced, both cut from the same files on any processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lesam_dist.data.cifar import CifarLoader, CifarSplit
from lesam_dist.data.cifar_transform import CifarTransform
from lesam_dist.data.pairs import PairLoader
from lesam_dist.errors import UserError

COUNTS = (120, 40, 8)
PLAIN = CifarTransform(crop_padding=0, horizontal_flip=False, mean=(0, 0, 0), std=(1 / 255,) * 3)
VIEWS = ("images", "second_view", "other_images", "other_second_view")


@pytest.fixture
def split(rng: np.random.Generator) -> CifarSplit:
    """Images of which all differ."""
    labels = rng.permutation(np.repeat(np.arange(3), COUNTS))
    images = rng.integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    return CifarSplit(Path("somewhere"), tuple("abc"), images, labels)


def load(split: CifarSplit, seed: int, **options: Any) -> PairLoader:
    defaults: dict[str, Any] = {"transform": CifarTransform(), "batch_size": 24, "rank": 0, "world_size": 1}
    return PairLoader(split, seed=seed, device=torch.device("cpu"), **{**defaults, "resample": 0.2, **options})


def test_the_first_batch_is_every_loaders(split: CifarSplit, seed: int) -> None:
    place: dict[str, Any] = {"batch_size": 24, "seed": seed, "rank": 0, "world_size": 1, "device": torch.device("cpu")}
    usual = CifarLoader(split, transform=CifarTransform(), train=True, **place)
    ours = load(split, seed)
    assert len(ours) == len(usual) == 7
    for batch, (images, labels) in zip(ours.epoch(2), usual.epoch(2), strict=True):
        assert torch.equal(batch["images"], images)
        assert torch.equal(batch["labels"], labels)


def test_views_are_of_the_same_images_and_labels(split: CifarSplit, seed: int) -> None:
    number = {image.tobytes(): i for i, image in enumerate(split.images)}
    for batch in load(split, seed, transform=PLAIN).epoch(0):
        found = {
            name: [number[image.astype(np.uint8).tobytes()] for image in batch[name].round().numpy()] for name in VIEWS
        }
        assert found["images"] == found["second_view"]
        assert found["other_images"] == found["other_second_view"]
        assert split.labels[found["images"]].tolist() == batch["labels"].tolist()
        assert split.labels[found["other_images"]].tolist() == batch["other_labels"].tolist()


def test_views_are_cropped_and_flipped_by_themselves(split: CifarSplit, seed: int) -> None:
    """Of two views of one image, 1 in 162 is the same; two standard deviations of slack would be 3 of 168."""
    [batches] = [list(load(split, seed).epoch(0))]
    for one, other in (("images", "second_view"), ("other_images", "other_second_view")):
        same = sum(int((b[one] == b[other]).flatten(1).all(dim=1).sum()) for b in batches)
        assert same < 10  # 7 standard deviations


@pytest.mark.parametrize("resample", [0.0, 0.2, 1.0, 1.7])
def test_the_second_batch_has_the_classes_as_often_as_it_should(split: CifarSplit, seed: int, resample: float) -> None:
    """p_c ~ n_c^(1 - r), and within a class each image as often as the others; 40 epochs of 168 draws."""
    number = {image.tobytes(): i for i, image in enumerate(split.images)}
    drawn = np.zeros(len(split))
    loader = load(split, seed, transform=PLAIN, resample=resample)
    for epoch in range(40):
        for batch in loader.epoch(epoch):
            for image in batch["other_images"].round().numpy().astype(np.uint8):
                drawn[number[image.tobytes()]] += 1
    total = drawn.sum()
    assert total == 40 * 168
    weights = np.array(COUNTS, float) ** (1 - resample)
    p = weights / weights.sum()
    for label, share in enumerate(p):
        own = drawn[split.labels == label]
        assert abs(own.sum() / total - share) < 6 * np.sqrt(share * (1 - share) / total)
        expected = own.sum() / len(own)
        # The sum of the squared deviations is chi-square with n - 1 degrees of freedom.
        chi = np.sum((own - expected) ** 2) / expected
        assert abs(chi - (len(own) - 1)) < 8 * np.sqrt(2 * len(own))


def test_batches_depend_on_seed_epoch_and_position_alone(split: CifarSplit, seed: int) -> None:
    whole = list(load(split, seed).epoch(1))
    for world in (2, 3):
        parts = zip(*(load(split, seed, rank=r, world_size=world).epoch(1) for r in range(world)), strict=True)
        for batch, shares in zip(whole, parts, strict=True):
            for name, value in batch.items():
                assert torch.equal(value, torch.cat([share[name] for share in shares]))
    loader = load(split, seed)
    next(loader.epoch(0))
    resumed = list(loader.epoch(1, start=3))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole[3:], resumed, strict=True) for k in a)
    for other in (load(split, seed).epoch(0), load(split, seed + 1).epoch(1)):
        first = next(other)
        assert not torch.equal(first["labels"], whole[0]["labels"])
        assert not torch.equal(first["other_images"], whole[0]["other_images"])


def test_resume_refuses_another_resampling(split: CifarSplit, seed: int) -> None:
    state = load(split, seed).state_dict()
    load(split, seed).load_state_dict(state)
    with pytest.raises(UserError, match=r"long_tail.resample was 0.2 in the checkpoint and is 0.3 now"):
        load(split, seed, resample=0.3).load_state_dict(state)
    with pytest.raises(UserError, match="the seed was"):
        load(split, seed + 1).load_state_dict(state)


def test_a_closed_loader_says_so(split: CifarSplit, seed: int) -> None:
    loader = load(split, seed)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))
