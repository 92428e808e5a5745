"""CIFAR on the device: the pixels of the files, cropped, flipped and cut out as drawn, on any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10, cifar
from torchvision.transforms import v2

from lesam_dist.data import epoch_order
from lesam_dist.data.cifar import CifarLoader, CifarSplit, load_cifar, prepare_cifar
from lesam_dist.data.cifar_transform import CifarDraws, CifarTransform, draw
from lesam_dist.errors import UserError
from tests.cifar_files import class_names, pack, write_cifar

Load = Callable[..., CifarLoader]
EVERYTHING = CifarTransform(cutout=16, cutout_probability=0.5, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture
def split(rng: np.random.Generator) -> CifarSplit:
    """Random images without black pixels, so that padding can be told from them."""
    images = rng.integers(1, 256, (230, 3, 32, 32), dtype=np.uint8)
    return CifarSplit(Path("somewhere"), tuple("abc"), images, rng.integers(0, 3, 230))


@pytest.fixture
def load(seed: int) -> Load:
    """A loader on the CPU, with defaults for what a test does not care about."""

    def build(split: CifarSplit, **options: Any) -> CifarLoader:
        defaults: dict[str, Any] = {"transform": EVERYTHING, "train": True, "batch_size": 60, "seed": seed, "rank": 0}
        return CifarLoader(split, **{**defaults, "world_size": 1, "device": torch.device("cpu"), **options})

    return build


def read(loader: CifarLoader, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("packed", [False, True])
def test_files_are_read(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, no_network: None, name: str, packed: bool
) -> None:
    """Unpacked or in their archive, without a network."""
    written = write_cifar(tmp_path, name, (50, 20), rng, monkeypatch)
    if packed:
        pack(tmp_path, name, monkeypatch)
    prepare_cifar(name, tmp_path)
    for split, expected in zip(load_cifar(name, tmp_path), written, strict=True):
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert np.array_equal(split.images, expected.pixels)
        assert split.labels.dtype == np.int64
        assert np.array_equal(split.labels, expected.labels)
        assert split.classes == tuple(class_names(name))
        assert len(split) == len(expected.labels)


def test_data_that_is_missing_or_damaged(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    message = (
        rf"cifar10 in '{tmp_path}' is missing or damaged, and was not downloaded \(.*{{}}.*\): put "
        r"cifar-10-python.tar.gz from https://.*/cifar-10-python.tar.gz into that folder, or unpack it there, "
        r"as cifar-10-batches-py/ with data_batch_1, .*, test_batch, batches.meta"
    )
    with pytest.raises(UserError, match=message.format("no network")):
        prepare_cifar("cifar10", tmp_path)
    with pytest.raises(UserError, match=message.format(r"not found or corrupted")):
        load_cifar("cifar10", tmp_path)
    write_cifar(tmp_path, "cifar10", (50, 20), rng, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / "data_batch_3"
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=message.format("no network")):
        prepare_cifar("cifar10", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cifar100 in '.*file/below' is missing"):
        prepare_cifar("cifar100", tmp_path / "file" / "below")


def test_whole_data_is_not_downloaded_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    write_cifar(tmp_path, "cifar100", (10, 10), rng, monkeypatch)
    prepare_cifar("cifar100", tmp_path)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def reference(
    images: NDArray[np.uint8], draws: CifarDraws, transform: CifarTransform
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One image after the other: what the loader should make of them, and how many pixels each hole covers."""
    mean, std = (np.float32([255 * v for v in values]).reshape(3, 1, 1) for values in (transform.mean, transform.std))
    done, areas = [], []
    for image, top, left, flip, hole_top, hole_left in zip(images, *draws, strict=True):
        p = transform.crop_padding
        canvas = np.zeros((3, 32 + 2 * p, 32 + 2 * p), np.uint8)
        canvas[:, p : p + 32, p : p + 32] = image
        cropped = canvas[:, top : top + 32, left : left + 32]
        out = ((cropped[:, :, ::-1] if flip else cropped).astype(np.float32) - mean) / std
        hole = np.zeros((32, 32), bool)
        if transform.cutout:
            end_row, end_column = hole_top + transform.cutout, hole_left + transform.cutout
            hole[max(hole_top, 0) : max(end_row, 0), max(hole_left, 0) : max(end_column, 0)] = True
        out[:, hole] = 0
        done.append(out)
        areas.append(hole.sum())
    return np.stack(done), np.array(areas)


@pytest.mark.parametrize(
    "transform",
    [
        EVERYTHING,
        CifarTransform(),
        CifarTransform(crop_padding=0, horizontal_flip=False),
        CifarTransform(crop_padding=9, cutout=7),
        CifarTransform(cutout=32),
    ],
    ids=["everything", "default", "nothing", "odd", "largest hole"],
)
def test_training_images_are_those_drawn(split: CifarSplit, load: Load, seed: int, transform: CifarTransform) -> None:
    """To the bit, for every image of two epochs, against numpy slices."""
    loader = load(split, transform=transform)
    assert len(loader) == 3
    for epoch in (0, 1):
        order = epoch_order(230, seed=seed, epoch=epoch, shuffle=True)
        batches = list(loader.epoch(epoch))
        assert len(batches) == 3
        for i, (images, labels) in enumerate(batches):
            samples = order[60 * i : 60 * (i + 1)]
            draws = draw(transform, range(60 * i, 60 * (i + 1)), seed=seed, epoch=epoch)
            expected, _ = reference(split.images[samples], draws, transform)
            assert images.dtype == torch.float32
            assert images.is_contiguous()
            assert np.array_equal(images.numpy(), expected)
            assert labels.tolist() == split.labels[samples].tolist()


def test_evaluation_images_are_torchvisions(split: CifarSplit, load: Load) -> None:
    images, labels = read(load(split, train=False))
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    theirs = torch.stack([transform(image.transpose(1, 2, 0)) for image in split.images])
    theirs = v2.functional.normalize(theirs, list(EVERYTHING.mean), list(EVERYTHING.std))
    # Divided by 255 before or after: a rounding each, at values up to 4.
    torch.testing.assert_close(images, theirs, rtol=1e-6, atol=2e-6)
    assert labels.tolist() == split.labels.tolist()


def test_black_borders_are_where_the_crop_left_the_image(split: CifarSplit, load: Load, seed: int) -> None:
    """Zero padding is black, not the mean colour."""
    transform = CifarTransform(mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    [images] = [images for images, _ in itertools.islice(load(split, transform=transform).epoch(0), 1)]
    draws = draw(transform, range(60), seed=seed, epoch=0)
    black = (images == -0.5).all(dim=1).sum(dim=(1, 2))
    inside = (32 - np.abs(draws.top - 4)) * (32 - np.abs(draws.left - 4))
    assert black.tolist() == (1024 - inside).tolist()


@pytest.mark.parametrize("train", [True, False])
def test_images_for_a_larger_model(split: CifarSplit, load: Load, train: bool) -> None:
    transform = CifarTransform(cutout=8)
    larger = CifarTransform(cutout=8, image_size=224)
    [small], [large] = (
        [images for images, _ in itertools.islice(load(split, transform=t, train=train).epoch(0), 1)]
        for t in (transform, larger)
    )
    assert large.shape == (60, 3, 224, 224)
    torch.testing.assert_close(large, v2.functional.resize(small, [224, 224]))


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_draws_are_uniform(seed: int) -> None:
    """Crops over all 9 x 9 places, half of the images flipped, hole centres over all 32 x 32 pixels."""
    n = 20_000
    draws = draw(EVERYTHING, range(2 * n, 3 * n), seed=seed, epoch=1)

    def counts_are_uniform(values: NDArray[np.int64], low: int, number: int) -> None:
        counts = np.bincount(values - low, minlength=number)
        assert len(counts) == number
        expected = len(values) / number
        assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)  # 6 standard deviations of a count

    counts_are_uniform(draws.top * 9 + draws.left, 0, 81)
    counts_are_uniform(draws.flip, 0, 2)
    has_hole = draws.hole_top < 32
    assert abs(has_hole.mean() - 0.5) < 6 * 0.5 / n**0.5
    counts_are_uniform(draws.hole_top[has_hole], -8, 32)
    counts_are_uniform(draws.hole_left[has_hole], -8, 32)
    columns = np.stack([*draws[:3], has_hole, draws.hole_left]).astype(float)
    correlation = np.corrcoef(columns) - np.eye(5)
    assert np.abs(correlation).max() < 6 / n**0.5


def test_draws_are_a_function_of_seed_epoch_and_position(seed: int) -> None:
    n = 5000
    positions = range(2 * n, 3 * n)
    draws = draw(EVERYTHING, positions, seed=seed, epoch=1)
    assert all(map(np.array_equal, draws, draw(EVERYTHING, positions, seed=seed, epoch=1)))
    before, after = range(n, 2 * n), range(3 * n, 4 * n)
    for at, key in ((positions, (seed + 1, 1)), (positions, (seed, 2)), (before, (seed, 2)), (after, (seed, 1))):
        other = draw(EVERYTHING, at, seed=key[0], epoch=key[1])
        for ours, theirs in zip(draws, other, strict=True):
            assert abs(np.corrcoef(ours, theirs)[0, 1]) < 6 / n**0.5
    plain = draw(CifarTransform(horizontal_flip=False), positions, seed=seed, epoch=1)
    assert not plain.flip.any()
    assert np.array_equal(plain.top, draws.top), "other options must not move the crops"
    assert np.array_equal(plain.left, draws.left)


@pytest.mark.parametrize(("side", "probability"), [(16, 1.0), (16, 0.5), (7, 1.0), (32, 0.25)])
def test_area_of_the_hole(split: CifarSplit, load: Load, seed: int, side: int, probability: float) -> None:
    """Per image what lies inside, on average the closed form."""
    transform = CifarTransform(crop_padding=0, cutout=side, cutout_probability=probability, mean=(0, 0, 0))
    zeros, drawn = [], []
    for epoch in range(4):
        images, _ = read(load(split, transform=transform, batch_size=230), epoch)
        zeros.append((images == 0).all(dim=1).sum(dim=(1, 2)))
        draws = draw(transform, range(230), seed=seed, epoch=epoch)
        drawn.append(reference(split.images, draws, transform)[1])
    assert torch.cat(zeros).tolist() == np.concatenate(drawn).tolist()
    # Of a row of 32 pixels, the hole around a centre c covers [c - side // 2, c - side // 2 + side).
    covered = [len(set(range(c - side // 2, c - side // 2 + side)) & set(range(32))) for c in range(32)]
    mean = probability * np.mean(covered) ** 2
    square = probability * np.mean(np.square(covered)) ** 2
    n = 4 * 230
    assert abs(float(torch.cat(zeros).double().mean()) - mean) < 6 * ((square - mean**2) / n) ** 0.5


# ---- epochs, processes, restarts -------------------------------------------------------------------------------------


def test_global_batches_do_not_depend_on_the_number_of_processes(split: CifarSplit, load: Load) -> None:
    whole = list(load(split).epoch(3))
    for world in (2, 3):
        loaders = [load(split, rank=rank, world_size=world) for rank in range(world)]
        assert {len(loader) for loader in loaders} == {3}
        for batch, parts in zip(whole, zip(*(each.epoch(3) for each in loaders), strict=True), strict=True):
            assert {len(labels) for _, labels in parts} == {60 // world}
            images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
            assert same(batch, (images, labels))


def test_training_epochs_differ_and_evaluation_epochs_do_not(split: CifarSplit, load: Load) -> None:
    train, val = load(split), load(split, train=False)
    first, second = read(train, 0), read(train, 1)
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])
    assert same(read(train, 0), first)
    assert same(read(val, 0), read(val, 1))


def test_evaluation_counts_every_image_once(split: CifarSplit, load: Load) -> None:
    whole = CifarTransform(mean=(0, 0, 0), std=(1 / 255,) * 3)
    for world in (1, 2, 3, 5, 232):
        options: dict[str, Any] = {"train": False, "batch_size": 17, "transform": whole, "world_size": world}
        loaders = [load(split, rank=rank, **options) for rank in range(world)]
        batches = [list(loader.epoch(0)) for loader in loaders]
        assert [len(loader) for loader in loaders] == list(map(len, batches))
        images, labels = (torch.cat(column) for column in zip(*itertools.chain(*batches), strict=True))
        assert np.array_equal(images.round().to(torch.uint8).numpy(), split.images)
        assert labels.tolist() == split.labels.tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact(split: CifarSplit, load: Load, world: int) -> None:
    """A fresh loader, with the state of one that ran on another number of processes, continues bit for bit."""
    for rank in range(world):
        unbroken = load(split, rank=rank, world_size=world)
        read(unbroken, 0), next(unbroken.epoch(1))  # the second left halfway
        resumed = load(split, rank=rank, world_size=world)
        resumed.load_state_dict(load(split, world_size=3 - world).state_dict())
        assert same(read(resumed, 2), read(unbroken, 2))


def test_resume_refuses_other_data(split: CifarSplit, load: Load, seed: int) -> None:
    state = load(split).state_dict()
    images, labels = split.images.copy(), split.labels.copy()
    images[7, 1, 2, 3] ^= 1
    labels[7] = (labels[7] + 1) % 3
    others = [
        (CifarSplit(split.root, split.classes, images, split.labels), {}, "the image files was"),
        (CifarSplit(split.root, split.classes, split.images, labels), {}, "the image files was"),
        (CifarSplit(split.root, split.classes, images[1:], labels[1:]), {}, "number of images was 230 .* is 229 now"),
        (split, {"seed": seed + 1}, f"the seed was {seed}"),
        (split, {"batch_size": 30}, "the global batch size was 60"),
    ]
    for other, options, message in others:
        with pytest.raises(UserError, match=message):
            load(other, **options).load_state_dict(state)
    load(CifarSplit(Path("elsewhere"), split.classes, split.images, split.labels)).load_state_dict(state)


def test_a_batch_stays_valid_and_the_data_as_it_was(split: CifarSplit, load: Load) -> None:
    before = split.images.copy()
    loader = load(split)
    kept = list(loader.epoch(0))
    copies = [(images.clone(), labels.clone()) for images, labels in kept]
    read(loader, 1)
    loader.close()
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))
    assert np.array_equal(split.images, before)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))


def test_reading_leaves_the_global_random_state_alone(split: CifarSplit, load: Load) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(load(split))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(split: CifarSplit, load: Load) -> None:
    """What the CPU makes of the same draws, without ever waiting for the device."""
    loader = load(split, device=torch.device("cuda"))
    read(loader, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(loader.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (expected, expected_labels) in zip(batches, load(split).epoch(1), strict=True):
        # Elementwise float32: at most a rounding of the division apart.
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-6, atol=0)
        assert torch.equal(labels.cpu(), expected_labels)


def test_errors_hold_the_value_and_the_remedy(split: CifarSplit, load: Load) -> None:
    with pytest.raises(UserError, match=r"batch size 100 cannot be divided by 8 processes: .* e.g. 104"):
        load(split, batch_size=100, world_size=8)
    with pytest.raises(UserError, match=r"'somewhere' has 230 training images, fewer than one global batch of 256"):
        load(split, batch_size=256)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 0}, "image_size is 0"),
        ({"crop_padding": 32}, "crop_padding is 32: it must be at least 0 and less than the image, 32 pixels"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"cutout": 33}, "cutout is 33: it must be at least 0 and at most the image, 32 pixels"),
        ({"cutout_probability": 1.5}, r"cutout_probability is 1.5: it must be in \[0, 1\]"),
        ({"cutout_probability": float("nan")}, "cutout_probability is nan"),
        ({"std": (1, 0, 1)}, r"std is \(1, 0, 1\)"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            CifarTransform(**options)
