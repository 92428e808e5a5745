"""What both backends make of an image's pixels: flips, crops and normalisation, the same by either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lesam_dist.data import ImageFolder, Transform, scan_split
from lesam_dist.data.plan import Plan
from lesam_dist.data.transform import ATTEMPTS, crop_window, draw
from tests.data.reading import Load, read, take


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
