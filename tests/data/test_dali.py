"""What is DALI's alone: options that change no pixel, and the same images on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lesam_dist.data import ImageFolder, Transform, scan_split
from lesam_dist.data.dali_options import DaliOptions
from tests.data.reading import Load, read, same, take

pytest.importorskip("nvidia.dali")


def test_channels_last_images_are_the_same(digits_train: ImageFolder, load: Load) -> None:
    """And lie so in memory, so that nothing copies them."""
    folder = take(digits_train, 60)
    for train in (True, False):
        options = {"train": train, "batch_size": 20}
        first, last = (
            next(load(folder, "dali", dali=DaliOptions(channels_last=channels_last), **options).epoch(0))[0]
            for channels_last in (False, True)
        )
        assert torch.equal(first, last)
        assert last.shape == (20, 3, 24, 24)
        assert last.is_contiguous(memory_format=torch.channels_last)


def test_options_change_no_pixel(digits_train: ImageFolder, load: Load, rng: np.random.Generator) -> None:
    folder = take(digits_train, 90)
    options = DaliOptions(prefetch=int(rng.integers(1, 6)), affinity=True)
    assert same(read(load(folder, "dali", batch_size=20)), read(load(folder, "dali", batch_size=20, dali=options)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
@pytest.mark.parametrize("train", [True, False])
def test_a_gpu_decodes_what_the_cpu_does(
    class_folder: Callable[..., Path],
    smooth: Callable[[int, int], Image.Image],
    rng: np.random.Generator,
    load: Load,
    decoder: Any,
    train: bool,
) -> None:
    """Within two grey levels; where the GPU decodes, with its own rounding of chroma, on average within one."""
    sizes = rng.integers(60, 300, (24, 2))
    files = {f"{i:02}.JPEG": smooth(*map(int, size)) for i, size in enumerate(sizes)}
    folder = scan_split(class_folder(train={"only": files}), "train")
    grey_levels = Transform(image_size=64, val_resize=64, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    options = {"train": train, "batch_size": 12, "transform": grey_levels, "dali": DaliOptions(decoder=decoder)}
    near = read(load(folder, "dali", device=torch.device("cpu"), **options))[0]
    far = read(load(folder, "dali", device=torch.device("cuda"), **options))[0]
    assert far.is_cuda
    difference = (near - far.cpu()).abs()
    assert difference.mean() < 1
    assert difference[:, :, 1:-1, 1:-1].max() <= (2.01 if decoder == "cpu" else 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_that_are_dropped_while_kernels_still_read_them(digits_train: ImageFolder, load: Load) -> None:
    """1,000 of them: what a slow kernel sees is the batch, also after Python has let it go."""
    folder, device = take(digits_train, 400), torch.device("cuda")
    loader = load(folder, "dali", batch_size=4, device=device)
    expected = [images.double().sum().item() for images, _ in loader.epoch(0)]
    big = torch.randn(2048, 2048, device=device)
    sums: list[Tensor] = []
    for _ in range(10):
        for images, _labels in loader.epoch(0):
            big = (big @ big).clamp(-1, 1)  # the device falls behind the host
            sums.append(images.double().sum())
            del images
    assert torch.equal(torch.stack(sums).cpu(), torch.tensor(expected * 10, dtype=torch.float64))
