"""What an analysis is of: the weights of a checkpoint in the model that they are of, and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import build_evaluation_loader
from lesam_dist.train.randomness import some_of
from lesam_dist.train.source import Source, build_with, image_task, plain, read_source


@dataclass(frozen=True)
class Subject:
    """A model on this process's device, unwrapped, and this process's share of some images, or all of them.

    Attributes:
        source: of the weights.
        model: with these weights in float32, in eval mode.
        batches: images and labels of this process.
        images: a text that differs for other images.
        samples: number of images over all processes; where each has all of them, of each.
        world: this process among all.
        whole: whether each process has all the images.
        num_classes: outputs of the model.
    """

    source: Source
    model: nn.Module
    batches: Sequence[Batch]
    images: str
    samples: int
    world: Distributed
    whole: bool
    num_classes: int

    def objective(self) -> Objective:
        """The mean cross entropy of all the images; where each process has all of them, each computes it alone."""
        return Objective(self.model, self.batches, self.world.alone() if self.whole else self.world)


def load(
    source: Source,
    world: Distributed,
    *,
    samples: int | None = 1024,
    split: str = "train",
    seed: int = 0,
    whole: bool = False,
) -> Subject:
    """The model of a checkpoint, and images as evaluation sees them: without augmentation.

    Which images: a random choice by ``seed``, the same for all runs on these data and for any number of processes.

    Args:
        source: from `lesam_dist.train.source.read_source`.
        world: this process among all.
        samples: number of images over all processes; None takes all, which must fit into memory.
        split: "train" or "val".
        seed: of the choice.
        whole: give each process all of them, instead of a share: for what processes compute without each other.

    Raises:
        UserError: images are missing, or too few; the weights are of another model or number of classes.
    """
    if not whole and samples is not None and samples < world.world_size:
        raise UserError(f"samples is {samples}: each of {world.world_size} processes needs an image.")
    config = plain(source.config)
    task = image_task(source, config, world)
    train, val = task.splits
    images = train if split == "train" else val
    if samples is not None and samples < len(images):
        images = images.take(some_of(len(images), samples, seed, train=split == "train"))
    if not whole and len(images) < world.world_size:
        raise UserError(f"there are {len(images)} {split} images for {world.world_size} processes: start fewer.")
    num_classes = task.num_classes
    model = build_with(source, num_classes, world)
    loader = build_evaluation_loader(config, images, world.alone() if whole else world)
    try:
        batches = list(loader.epoch(0))
    finally:
        loader.close()
    return Subject(source, model, batches, images.digest, len(images), world, whole, num_classes)


def load_run(path: Path | str, config: str | None = None, *, averaged: bool = False, **images: Any) -> Subject:
    """`load` of `read_source`, for a notebook: in this process alone, on a GPU where there is one.

    Args:
        path, config, averaged: see `read_source`.
        images: ``samples``, ``split`` and ``seed`` of `load`.

    Raises:
        UserError: as these.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load(read_source(Path(path), config, averaged=averaged), Distributed(0, 0, 1, device), **images)
