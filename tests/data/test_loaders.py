"""Both backends read what the plan says, exactly once, the same after a restart, and complain clearly."""

from __future__ import annotations

import builtins
import io
import itertools
import multiprocessing
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lesam_dist.data import ImageFolder, Loader, SyntheticLoader, Transform, build_loader, scan_split
from lesam_dist.data.plan import Plan
from lesam_dist.data.transform import ATTEMPTS, crop_window, draw
from lesam_dist.errors import UserError
from lesam_dist.parallel.signals import STOP_SIGNALS

Load = Callable[..., Loader]
WHOLE = Transform(image_size=32, val_resize=32, mean=(0, 0, 0), std=(1, 1, 1))  # digits as they are


def read(loader: Loader, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def take(folder: ImageFolder, n: int) -> ImageFolder:
    step = len(folder) // n
    return ImageFolder(folder.root, folder.classes, folder.paths[: n * step : step], folder.labels[: n * step : step])


# ----------------------------------------------------------------------------------------------- what is read


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


# ----------------------------------------------------------------------------------------------- what it does


def test_flips_and_crops(digits_train: ImageFolder, backend: str, load: Load, seed: int) -> None:
    """With the crop set to the whole image, a training image is its file or the mirror image of it."""
    folder = take(digits_train, 120)
    for flip in (False, True):
        transform = Transform(
            image_size=32,
            val_resize=32,
            random_area=(1, 1),
            random_aspect_ratio=(1, 1),
            horizontal_flip=flip,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        images, labels = read(load(folder, backend, transform=transform))
        [batch] = Plan(folder, True, 120, seed, 0, 1, transform).epoch(0)
        files = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in batch.paths])
        assert labels.tolist() == batch.labels.tolist()
        assert batch.draws is not None
        mirrored = torch.from_numpy(batch.draws.flip).bool()
        assert (0 < mirrored.sum() < 120) if flip else not mirrored.any()
        expected = torch.where(mirrored[:, None, None], files.flip(-1), files)
        assert torch.equal((255 * images).round(), expected[:, None].expand(-1, 3, -1, -1).float())


@pytest.mark.parametrize("train", [True, False])
def test_normalisation(
    class_folder: Callable[..., Path], backend: str, load: Load, rng: np.random.Generator, train: bool
) -> None:
    """An image of one colour c becomes (c / 255 - mean) / std, whatever is cropped from it."""
    colour = rng.integers(0, 256, 3)
    image = Image.new("RGB", (50, 40), tuple(int(c) for c in colour))
    mean, std = rng.uniform(0.2, 0.8, 3), rng.uniform(0.1, 0.5, 3)
    transform = Transform(image_size=24, val_resize=28, mean=tuple(mean), std=tuple(std))
    folder = scan_split(class_folder(train={"only": {"1.png": image}}), "train")
    images, _ = read(load(folder, backend, train=train, batch_size=1, transform=transform))
    expected = ((colour / 255 - mean) / std).reshape(1, 3, 1, 1)
    # float32 of a value up to 255 / (0.1 * 255), with cancellation against the mean.
    np.testing.assert_allclose(images.numpy(), np.broadcast_to(expected, images.shape), rtol=0, atol=1e-5)


def test_backends_agree_on_training_images(
    class_folder: Callable[..., Path],
    smooth: Callable[[int, int], Image.Image],
    rng: np.random.Generator,
    load: Load,
) -> None:
    """Same crop, same flip: within a grey level but at the edges (see Transform), on average far within."""
    pytest.importorskip("nvidia.dali")
    sizes = rng.integers(60, 300, (24, 2))
    files = {f"{i:02}.JPEG": smooth(*map(int, size)) for i, size in enumerate(sizes)}
    folder = scan_split(class_folder(train={"only": files}), "train")
    grey_levels = Transform(image_size=64, val_resize=64, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    dali, pillow = (
        read(load(folder, name, batch_size=24, transform=grey_levels))[0] for name in ("dali", "torchvision")
    )
    difference = (dali - pillow).abs()
    assert difference.mean() < 0.3
    # JPEG decoders may be off by one more where they decode a part of the image only.
    assert difference[:, :, 1:-1, 1:-1].max() <= 4.01


def test_crop_graph_equals_crop_window(rng: np.random.Generator, seed: int) -> None:
    """The window computed inside DALI's graph is that of the readable reference, to the pixel."""
    pytest.importorskip("nvidia.dali")
    from lesam_dist.data.dali_graph import crop_graph, dali, fn, types

    n, bounds = 2000, (0.6, 4 / 3)
    shapes = np.exp(rng.uniform(0, np.log(3000), (n, 2))).astype(np.int64)  # thin ones too
    draws = draw(Transform(random_aspect_ratio=bounds), range(n), seed=seed, epoch=0)
    pipeline = dali.Pipeline(n, 1, None, prefetch_queue_depth=1)
    with pipeline:
        inputs = fn.external_source(
            lambda: (shapes, *draws[:3]), num_outputs=4, dtype=[types.INT64, *[types.FLOAT64] * 3], ndim=1
        )
        pipeline.set_outputs(*crop_graph(*inputs, bounds))
    start, extent = (output.as_array() for output in pipeline.run())
    expected = np.array(
        [crop_window(int(h), int(w), *row, bounds) for (h, w), *row in zip(shapes, *draws[:3], strict=True)]
    )
    assert np.array_equal(np.hstack([start, extent]), expected)
    fits = [((a * r <= w / h) & (a * w / h <= r)).any() for (h, w), a, r in zip(shapes, *draws[:2], strict=True)]
    assert 0.1 < np.mean(fits) < 0.99, "both branches must be tested"
    assert draws.area.shape[1] == ATTEMPTS


# ------------------------------------------------------------------------------------------ stop and continue


@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact(digits_train: ImageFolder, backend: str, load: Load, world: int) -> None:
    """A fresh loader, with the state of one that ran on another number of ranks, continues bit for bit."""
    folder = take(digits_train, 250)
    unbroken = [load(folder, backend, rank=rank, world_size=world) for rank in range(world)]
    for loader in unbroken:
        read(loader, 0), read(loader, 1)
    state = load(folder, backend, world_size=3 - world).state_dict()
    for rank, loader in enumerate(unbroken):
        resumed = load(folder, backend, rank=rank, world_size=world)
        resumed.load_state_dict(state)
        assert same(read(resumed, 2), read(loader, 2))


def test_an_epoch_may_be_left_halfway(digits_train: ImageFolder, backend: str, load: Load) -> None:
    folder = take(digits_train, 200)
    loader = load(folder, backend, batch_size=20)
    expected = {epoch: read(load(folder, backend, batch_size=20), epoch) for epoch in (0, 1, 5)}
    for stop_after in (0, 1, 3, 9, 10):
        list(itertools.islice(loader.epoch(4), stop_after))
        for epoch in (5, 0, 1):
            assert same(read(loader, epoch), expected[epoch])
    half_read = loader.epoch(0)  # not even closed
    next(half_read)
    assert same(read(loader, 1), expected[1])


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


def test_workers_outlive_the_signals_that_end_a_run(digits_train: ImageFolder, load: Load) -> None:
    """torchrun and Slurm signal all processes: the step is finished, and the checkpoint made, with their help."""
    loader = load(take(digits_train, 100), "torchvision", batch_size=10, workers=1)
    batches = loader.epoch(0)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if "forkserver" in str(type(child)).lower())
    numbers = " ".join(f"-{int(number)} {worker.pid};" for number in STOP_SIGNALS)
    subprocess.run(["sh", "-c", numbers.replace("-", "kill -")], check=True)
    assert len(list(itertools.islice(batches, 8))) == 8
    assert worker.is_alive()
    worker.terminate()  # as the interpreter does at its end, where nobody has closed the loader
    worker.join(60)
    assert worker.exitcode == 0
    loader.close()


def test_reading_leaves_the_global_random_state_alone(digits_train: ImageFolder, backend: str, load: Load) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    read(load(take(digits_train, 120), backend))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_resume_refuses_other_data(digits_train: ImageFolder, backend: str, load: Load, seed: int) -> None:
    folder = take(digits_train, 150)
    state = load(folder, backend).state_dict()
    with pytest.raises(UserError, match=r"the number of images was 150 in the checkpoint and is 149 now"):
        load(ImageFolder(folder.root, folder.classes, folder.paths[1:], folder.labels[1:]), backend).load_state_dict(
            state
        )
    renamed = ImageFolder(folder.root, folder.classes, (*folder.paths[1:], folder.paths[0]), folder.labels)
    with pytest.raises(UserError, match=r"the image files was"):
        load(renamed, backend).load_state_dict(state)
    with pytest.raises(UserError, match=rf"the seed was {seed} in the checkpoint and is {seed + 1} now"):
        load(folder, backend, seed=seed + 1).load_state_dict(state)
    with pytest.raises(UserError, match=r"the global batch size was 120 .* is 60 now.*Go back to the former"):
        load(folder, backend, batch_size=60).load_state_dict(state)


# ----------------------------------------------------------------------------------------------------- errors


CAUSES = {
    "truncated": r"[Tt]runcated",
    "empty": r"cannot identify image file",
    "text": r"cannot identify image file",
    "gif": r"DALI: .*; Pillow: reads it, as GIF",
}


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "gone", "gif"])
def test_a_broken_image_is_named(
    class_folder: Callable[..., Path],
    smooth: Callable[[int, int], Image.Image],
    backend: str,
    load: Load,
    rng: np.random.Generator,
    damage: str,
) -> None:
    root = class_folder(train={"only": {f"{i:02}.JPEG": smooth(64, 80) for i in range(30)}})
    folder = scan_split(root, "train")
    # Evaluation reads whole images; DALI may not need the missing end of one for a crop.
    loader = load(folder, backend, train=False, batch_size=5)
    whole = read(loader, 0)
    path = Path(folder.paths[int(rng.integers(30))])
    data = path.read_bytes()
    with io.BytesIO() as buffer:
        smooth(20, 30).save(buffer, "GIF")
        gif = buffer.getvalue()
    broken = {"truncated": data[: len(data) // 3], "empty": b"", "text": b"404: not found\n" * 9, "gif": gif}
    if damage == "gif" and backend == "torchvision":
        pytest.skip("Pillow reads it, whatever its name")
    if damage == "gone":
        path.unlink()
        message = r"cannot open the image '(.*)' .*put it back, or start again"
    else:
        path.write_bytes(broken[damage])
        message = (
            rf"cannot decode the image '(.*)' of {len(broken[damage])} bytes .*{CAUSES[damage]}.*: remove the file"
        )
    for _ in range(2):  # and again at the next attempt
        with pytest.raises(UserError, match=message) as caught:
            read(loader, 0)
        assert str(path) in str(caught.value)
    path.write_bytes(data)  # repaired: the same loader goes on
    assert same(read(loader, 0), whole)


def test_a_broken_image_in_a_worker_is_named(class_folder: Callable[..., Path], load: Load) -> None:
    folder = scan_split(class_folder(train={"only": {"1.JPEG": b"no image"}}), "train")
    with pytest.raises(UserError, match=r"^cannot decode the image '.*1.JPEG' of 8 bytes \(cannot identify"):
        read(load(folder, "torchvision", batch_size=1, workers=1))


def test_errors_hold_the_value_and_the_remedy(digits_train: ImageFolder, load: Load) -> None:
    with pytest.raises(UserError, match=r"unknown data backend 'dalli': did you mean 'dali'\?"):
        load(digits_train, "dalli")
    with pytest.raises(UserError, match=r"batch size 100 cannot be divided by 8 processes: .* e.g. 104"):
        load(digits_train, "torchvision", batch_size=100, world_size=8)
    with pytest.raises(UserError, match=r"1438 training images, fewer than one global batch of 2048: .*most 1438"):
        load(digits_train, "torchvision", batch_size=2048)
    load(digits_train, "torchvision", batch_size=2048, train=False)
    with pytest.raises(UserError, match=r"batch_size is 0.*at least 1"):
        load(digits_train, "torchvision", batch_size=0)
    with pytest.raises(UserError, match=r"val_resize \(128\) is smaller than image_size \(224\).*at least 224"):
        Transform(val_resize=128)
    with pytest.raises(UserError, match=r"random_area is \(0, 1\)"):
        Transform(random_area=(0, 1))
    with pytest.raises(UserError, match=r"random_aspect_ratio is \(2, 1\)"):
        Transform(random_aspect_ratio=(2, 1))
    with pytest.raises(UserError, match=r"std is \(1, 0, 1\)"):
        Transform(std=(1, 0, 1))
    with pytest.raises(UserError, match=r"image_size is 0"):
        Transform(image_size=0)


def test_dali_missing(digits_train: ImageFolder, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_dali(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(("nvidia", "lesam_dist.data.dali")):
            raise ModuleNotFoundError("No module named 'nvidia.dali'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_dali)
    with pytest.raises(UserError, match=r'pip install "lesam-dist\[dali\]".* or choose --data.backend torchvision'):
        load(digits_train, "dali")


# -------------------------------------------------------------------------------------------------- synthetic


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
