"""What a trained classifier says of images in files, by the names of its classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesam_dist.config.schema import Config
from lesam_dist.data.cifar import CifarLoader, CifarSplit
from lesam_dist.data.decode import decode_rgb
from lesam_dist.data.errors import reason_of
from lesam_dist.data.in_memory import small
from lesam_dist.data.reading import read_file
from lesam_dist.data.torchvision_loader import evaluation_view, scale_of
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import device_transform, folder_transform
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.precision import autocast_dtype
from lesam_dist.train.class_names import CLASSES, read_classes
from lesam_dist.train.formats import in_format
from lesam_dist.train.numerics import numerics
from lesam_dist.train.source import Source, image_task, model_of, unsharded


class Prediction(NamedTuple):
    """What is said of an image: names and probabilities of its most probable classes, the first first."""

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(
    source: Source, paths: Sequence[str], world: Distributed, broken: list[str], *, top: int = 5
) -> Iterator[Prediction]:
    """What the model says of each image that can be read, in their order.

    Args:
        source: of `read_source`.
        paths: of the images.
        world: this process alone.
        broken: gets a line for each image that cannot be read, with the reason.
        top: classes of each; of a model that has fewer, all.

    Raises:
        UserError: the weights are of another network, or the names of its classes are not known.
    """
    config = unsharded(source.config)
    task = image_task(source, config, world)
    names = _class_names(source, task)
    model = model_of(source, task)
    dtype = autocast_dtype(config.precision)
    memory_format = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    with numerics(config.precision, world.device):
        for start in range(0, len(paths), config.data.eval_batch_size):
            read, images = read_images(config, paths[start : start + config.data.eval_batch_size], world.device, broken)
            if not read:
                continue
            with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
                logits = model(in_format(images, memory_format))
            found = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]))
            for path, values, labels in zip(read, found.values.tolist(), found.indices.tolist(), strict=True):
                yield Prediction(path, tuple(names[label] for label in labels), tuple(values))


def _class_names(source: Source, task: ImageTask) -> list[str]:
    """Of all outputs; an output beyond the classes of the data, which model.num_classes may ask for, has its number."""
    classes = read_classes(source.folder)
    if classes is None:
        print(
            f"'{source.folder}' has no {CLASSES}, which earlier versions did not write: the classes are taken from the "
            f"data in {task.config.data.root} (--data.root DIR says where they are).",
            file=sys.stderr,
        )
        classes = tuple(task.splits[0].classes)
    task.num_classes = task.config.model.num_classes or len(classes)
    return [*classes, *map(str, range(len(classes), task.num_classes))]


def read_images(
    config: Config, paths: Sequence[str], device: torch.device, broken: list[str]
) -> tuple[list[str], Tensor]:
    """Those that can be read, and their images as evaluation sees them, float32 (B, 3, S, S) on the device.

    Read one by one, to name those that are broken, and as the torchvision backend reads them: after a resize DALI's
    pixels may be another of 256 levels beside theirs.
    """
    read: list[str] = []
    views: list[NDArray[np.uint8] | Tensor] = []
    transform = None if config.on_device else folder_transform(config)
    for path in paths:
        try:
            image = decode_rgb(read_file(path))
        except Exception as error:  # whatever a broken file leads Pillow to
            broken.append(f"'{path}': {reason_of(error)}")
            continue
        read.append(path)
        whole = torch.from_numpy(image).permute(2, 0, 1)
        views.append(small(image).transpose(2, 0, 1) if transform is None else evaluation_view(whole, transform))
    if not views:
        return [], torch.empty(0, device=device)
    if transform is None:
        return read, _on_device(config, np.stack([np.asarray(view) for view in views]), device)
    mean, std = scale_of(transform, device)
    images = torch.stack([torch.as_tensor(view) for view in views]).to(device)
    return read, (images - mean).div_(std)


def _on_device(config: Config, images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """As the loader of images that stay on the device gives them in evaluation."""
    split = CifarSplit(Path(), ("",), images, np.zeros(len(images), np.int64))
    place: dict[str, Any] = {"train": False, "batch_size": len(images), "seed": 0, "rank": 0, "world_size": 1}
    loader = CifarLoader(split, transform=device_transform(config), device=device, **place)
    try:
        ((found, _),) = loader.epoch(0)
    finally:
        loader.close()
    return found
