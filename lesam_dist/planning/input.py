"""How many images a second a core reads, decodes and augments: measured on this machine."""

from __future__ import annotations

import copy
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lesam_dist.config.schema import Config, LabelNoiseConfig
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import build_folders, build_loaders

SECONDS = 6.0
_IMAGES, _BATCH = 192, 32
_SIZE = (500, 375)  # a usual one of ImageNet's


def measure_decode_rate(config: Config, seconds: float = SECONDS) -> float:
    """Images per second of CPU time, from the training images of the run, or from generated ones where it has none.

    CPU time, so that what else the machine does counts little; that of all threads and worker processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(config)
        if config.data.root is None:
            _write_images(Path(folder))
            config.data = replace(
                config.data, root=folder, builtin=None, skip_list=None, label_noise=LabelNoiseConfig()
            )
        world = Distributed(0, 0, 1, torch.device("cpu"))
        folders = build_folders(config, world)
        config.data.batch_size = min(_BATCH, len(folders[0]))
        config.data.micro_batches = 1
        loader, _ = build_loaders(config, folders, world)
        count, epoch = 0, 0
        for images, _ in loader.epoch(epoch):  # workers start, buffers are made
            count += len(images)
            if count >= 2 * _BATCH:
                break
        count, used, end = 0, _cpu_seconds(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            epoch += 1
            for images, _ in loader.epoch(epoch):
                count += len(images)
                if time.perf_counter() >= end:
                    break
        loader.close()  # workers end: their time is known now
        return count / (_cpu_seconds() - used)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _write_images(root: Path) -> None:
    """JPEG files of 500 x 375 pixels, about as large as photographs are: smooth, with a little noise."""
    random = np.random.default_rng(0)
    for index in range(_IMAGES):
        split, label = ("train", index % 2) if index % 8 else ("val", index // 8 % 2)
        path = root / split / str(label)
        path.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(_SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path / f"{index}.jpg", quality=90)
