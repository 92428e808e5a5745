"""`lesam-dist predict`: what a trained classifier says of images, by the names of its classes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesam_dist.config.schema import Config
from lesam_dist.data.cifar import CifarLoader, CifarSplit
from lesam_dist.data.decode import decode_rgb
from lesam_dist.data.errors import reason_of
from lesam_dist.data.folder import EXTENSIONS
from lesam_dist.data.in_memory import small
from lesam_dist.data.reading import read_file
from lesam_dist.data.torchvision_loader import evaluation_view, scale_of
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.tasks.images.data import device_transform, folder_transform
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.precision import autocast_dtype
from lesam_dist.train.checkpoint.arguments import Parser
from lesam_dist.train.class_names import CLASSES, read_classes
from lesam_dist.train.eval_command import add_source, divide
from lesam_dist.train.formats import in_format
from lesam_dist.train.numerics import numerics
from lesam_dist.train.source import Source, image_task, model_of, read_source, unsharded

_TEXT = """
Name the classes of images, most probable first, with their probabilities (softmax). Images are seen as in the run's
evaluation. One that cannot be read is named and left out, and the status is then 1. Other flags are those of
`lesam-dist train`, over the run's own config: --data.eval_batch_size N, --parallel.device cpu.
"""


class Prediction(NamedTuple):
    """What is said of an image: names and probabilities of its most probable classes, the first first."""

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict_command(argv: Sequence[str]) -> int:
    """The command; 1 where an image could not be read, else 0.

    Raises:
        UserError: for anything wrong in ``argv``, the checkpoint, or the names of the classes.
    """
    parser = Parser("predict", _TEXT, "lesam-dist predict runs/digits images/ --output predictions.csv")
    add_source(parser)
    parser.add_argument("images", nargs="+", type=Path, help="image files, and folders of them at any depth")
    parser.add_argument("--output", type=Path, help="file to write, .csv or .jsonl (default: CSV on the terminal)")
    parser.add_argument("--top", type=int, default=5, help="classes of each image (default: 5)")
    own, flags = divide(argv)
    arguments = parser.parse_args(own)
    if arguments.top < 1:
        raise UserError(f"--top is {arguments.top}: it must be at least 1.")
    if arguments.output is not None and arguments.output.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--output is '{arguments.output}': name a file that ends in .csv or .jsonl.")
    paths = images_in(arguments.images)
    source = read_source(arguments.checkpoint, arguments.config, flags, averaged=arguments.ema)
    parallel = source.config.parallel
    with process_group(parallel.device, parallel.timeout_s) as world:
        if world.world_size > 1:
            raise UserError(f"predict works in one process, and there are {world.world_size}: start one.")
        broken: list[str] = []
        predictions = predict(source, paths, world, broken, top=arguments.top)
        first = next(predictions, None)  # what is wrong shows before the file is written
        with _writing(arguments.output) as file:
            write = _as_jsonl if arguments.output and arguments.output.suffix == ".jsonl" else _as_csv
            count = write(file, first, predictions, arguments.top)
    for reason in broken:
        print(f"cannot read {reason}", file=sys.stderr)
    if arguments.output:
        print(f"{arguments.output}: {count} images, {len(broken)} left out", file=sys.stderr)
    return 1 if broken else 0


def images_in(places: Sequence[Path]) -> list[str]:
    """The files, and those of the folders that end as images do, sorted in each; hidden ones are left out.

    Raises:
        UserError: a place is not there, or a folder has no images.
    """
    found: list[str] = []
    for place in places:
        if place.is_dir():
            inside = sorted(
                path
                for path in place.rglob("*")
                if path.name.lower().endswith(EXTENSIONS)
                and not any(part.startswith(".") for part in path.relative_to(place).parts)
                and path.is_file()
            )
            if not inside:
                raise UserError(f"'{place}' has no images, which end in {', '.join(EXTENSIONS)}: look at its name.")
            found += map(str, inside)
        elif place.exists():
            found.append(str(place))
        else:
            raise UserError(f"'{place}' does not exist: give image files, or folders of them.")
    return found


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


@contextmanager
def _writing(output: Path | None) -> Iterator[IO[str]]:
    """The terminal, or a file that appears when it is complete."""
    if output is None:
        yield sys.stdout
        return
    aside = output.with_name(f".{output.name}.partial")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            yield file
        aside.replace(output)
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror or error}.") from error
    finally:
        aside.unlink(missing_ok=True)


def _each(first: Prediction | None, rest: Iterator[Prediction]) -> Iterator[Prediction]:
    if first is not None:
        yield first
        yield from rest


def _as_csv(file: IO[str], first: Prediction | None, rest: Iterator[Prediction], top: int) -> int:
    """A line for each image: path, then class and probability of each place."""
    places = len(first.classes) if first else top
    header = ["path", *(f"{name}_{place}" for place in range(1, places + 1) for name in ("class", "probability"))]
    count = 0
    file.write(_csv_line(header))
    for each in _each(first, rest):
        pairs = zip(each.classes, each.probabilities, strict=True)
        file.write(_csv_line([each.path, *(text for name, p in pairs for text in (name, f"{p:.6g}"))]))
        count += 1
    return count


def _csv_line(row: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(row)
    return line.getvalue()


def _as_jsonl(file: IO[str], first: Prediction | None, rest: Iterator[Prediction], top: int) -> int:
    count = 0
    for each in _each(first, rest):
        file.write(json.dumps(each._asdict()) + "\n")
        count += 1
    return count
