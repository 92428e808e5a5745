"""Long-tailed parts: the field's images, the counts of its tables, and what cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lesam_dist.data.cifar import CifarSplit
from lesam_dist.data.folder import scan_split
from lesam_dist.data.in_memory import in_memory
from lesam_dist.data.long_tail import Subset, class_counts, long_tailed, long_tailed_counts
from lesam_dist.errors import UserError


def split_of(labels: NDArray[np.int64], classes: int) -> CifarSplit:
    """Sample i is an image of its number."""
    images = np.arange(len(labels))[:, None, None, None] * np.ones((1, 3, 1, 1), np.int64)
    return CifarSplit(Path("somewhere"), tuple(map(str, range(classes))), images.astype(np.uint8), labels)


@pytest.mark.parametrize(
    ("factor", "total", "groups"), [(100, 10_847, (35, 34, 31)), (50, 12_608, (41, 40, 19)), (10, 19_573, (69, 31, 0))]
)
def test_counts_are_those_of_the_literature(factor: int, total: int, groups: tuple[int, int, int]) -> None:
    counts = np.array(long_tailed_counts(500, 100, factor))
    assert counts.sum() == total
    assert (counts[0], counts[-1]) == (500, 500 // factor)
    assert ((counts > 100).sum(), ((counts > 20) & (counts <= 100)).sum(), (counts <= 20).sum()) == groups


@pytest.mark.parametrize("subset", ["ldam", "glmc"])
def test_the_images_are_those_of_the_released_code(rng: np.random.Generator, subset: Subset) -> None:
    """Against those codes' way: NumPy's global generator, masks and places within a class."""
    labels = rng.permutation(np.repeat(np.arange(6), 80))
    chosen: list[int] = []
    before = np.random.get_state()
    np.random.seed({"ldam": 0, "glmc": 3407}[subset])
    for label in range(6):
        index = np.where((labels >= label) & (labels < label + 1))[0]
        number = int(80 * 0.05 ** (label / 5.0))
        if subset == "ldam":
            np.random.shuffle(index)
            chosen += index[:number].tolist()
        else:
            chosen += index[np.random.choice(index.shape[0], number, replace=False)].tolist()
    np.random.set_state(before)
    split = long_tailed(split_of(labels, 6), 20, subset)
    assert split.labels.tolist() == labels[sorted(chosen)].tolist()
    assert split.images[:, 0, 0, 0].tolist() == [i % 256 for i in sorted(chosen)]
    assert class_counts(split.labels, 6).tolist() == [80, 43, 24, 13, 7, 4]


def test_the_global_random_state_is_left_alone_and_digests_differ(rng: np.random.Generator) -> None:
    whole = split_of(rng.permutation(np.repeat(np.arange(4), 50)), 4)
    before = np.random.get_state()[1].copy()
    digests = {long_tailed(whole, factor, subset).digest for factor in (10, 20) for subset in ("ldam", "glmc")}
    assert len(digests | {whole.digest}) == 5
    assert np.array_equal(np.random.get_state()[1], before)
    assert long_tailed(whole, 1, "ldam").digest == whole.digest


def test_class_folders(images: Path) -> None:
    folder = scan_split(images, "train")
    part = long_tailed(folder, 5, "ldam")
    assert class_counts(part.labels, 3).tolist() == [20, 8, 4]
    assert list(part.paths) == sorted(part.paths)
    assert part.digest != folder.digest
    kept = in_memory(part)
    assert kept.images.shape == (32, 3, 32, 32)
    for path, image in zip(part.paths, kept.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1), image)
    assert kept.labels.tolist() == part.labels.tolist()
    assert kept.classes == part.classes


def test_unequal_classes_all_have_enough(rng: np.random.Generator) -> None:
    labels = rng.permutation(np.repeat(np.arange(3), [40, 90, 60]))
    assert class_counts(long_tailed(split_of(labels, 3), 10, "glmc").labels, 3).tolist() == [40, 12, 4]


def test_other_images_are_resized_and_broken_ones_named(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (16, 16), dtype=np.uint8), 4, 0), 4, 1)
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "1.png")
    images = in_memory(scan_split(tmp_path, "train")).images
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(images, np.broadcast_to(np.asarray(expected), (1, 3, 32, 32)))
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot decode the image '.*a/0.png' of 8 bytes"):
        in_memory(scan_split(tmp_path, "train"))


def test_errors_hold_the_value_and_the_remedy() -> None:
    whole = split_of(np.repeat(np.arange(4), 49), 4)
    for factor in (0.5, 0, float("nan")):
        with pytest.raises(UserError, match=f"imbalance_factor is {factor}: .* at least 1"):
            long_tailed(whole, factor, "ldam")
    message = (
        "imbalance_factor is 60.5, which leaves class '3' without images, since the smallest .* has 49: .* most 48"
    )
    with pytest.raises(UserError, match=message):
        long_tailed(whole, 60.5, "ldam")
    assert long_tailed_counts(49, 4, 48)[-1] == 1
    with pytest.raises(UserError, match="no training images of class '4'"):
        long_tailed(split_of(whole.labels, 5), 2, "ldam")
