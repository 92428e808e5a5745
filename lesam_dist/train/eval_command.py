"""`lesam-dist eval`: what a run's own evaluation measures, of any of its checkpoints and on any data."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import torch

from lesam_dist.config.flags import divide
from lesam_dist.config.parser import Parser, examples
from lesam_dist.data.loader import Loader
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.tasks.images.data import build_evaluation_loader
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.loading import build_task
from lesam_dist.tasks.precision import autocast_dtype
from lesam_dist.tasks.task import Task
from lesam_dist.train.numerics import numerics
from lesam_dist.train.source import Source, add_source, model_of, read_source, unsharded
from lesam_dist.train.validation import Validation

_TEXT = """
Evaluate a checkpoint as its run does after each epoch: the same images, number formats and numbers. Other flags are
those of `lesam-dist train`, over the run's own config: --data.root DIR, --data.eval_batch_size N, --parallel.device
cpu.
"""
_EPILOG = f"""{examples("eval runs/digits --json")}

on several GPUs:
  torchrun --nproc-per-node 8 -m lesam_dist eval runs/digits"""
_OF_CLASSES = ("classification", "long_tail")  # tasks whose training images can be evaluated like the others


def evaluate_command(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: for anything wrong in ``argv``, the checkpoint, or the data.
    """
    parser = Parser("eval", _TEXT, _EPILOG)
    add_source(parser)
    parser.add_argument("--split", choices=("train", "val"), default="val", help="whose samples (default: val)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and all else to stderr")
    own, flags = divide(argv)
    arguments = parser.parse_args(own)
    with redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        source = read_source(arguments.checkpoint, arguments.config, flags, averaged=arguments.ema)
        parallel = source.config.parallel
        with process_group(parallel.device, parallel.timeout_s) as world:
            found = evaluate_source(source, world, arguments.split)
    if world.is_main:
        about = {"checkpoint": source.name, "run": str(source.folder), "split": arguments.split, **source.about}
        print(json.dumps(about | found) if arguments.json else _shown(about, found))


def evaluate_source(source: Source, world: Distributed, split: str = "val") -> dict[str, float | None]:
    """What the run's evaluation would report of these weights; numbers that are not finite are None.

    Each process has the whole model and its share of the samples. Of a run on one process, or under DDP, the numbers
    are those of its log; FSDP2 computes the same in another order.

    Args:
        source: the weights, and the config of their run.
        world: this process among all.
        split: "val" or "train"; the latter with the labels that the run trains on, and without augmentation.

    Raises:
        UserError: the data are missing; the weights are of another network; the task's training samples cannot be
            evaluated.
    """
    config = unsharded(source.config)
    task = build_task(config, world)
    with numerics(config.precision, world.device):
        loader, samples = _loader(task, split)
        try:
            last = config.precision.channels_last
            validation = Validation(
                task,
                model_of(source, task),
                loader,
                world,
                ema=None,
                autocast=autocast_dtype(config.precision),
                memory_format=torch.channels_last if last else torch.contiguous_format,
                samples=samples,
            )
            found = validation.of_weights()
        finally:
            loader.close()
    assert found is not None, "nobody leaves"
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _loader(task: Task, split: str) -> tuple[Loader, int]:
    """A loader of this process's share of a split, and the number of all its samples."""
    if isinstance(task, ImageTask) and task.config.task in _OF_CLASSES:
        images = task.splits[split == "val"]
        return build_evaluation_loader(task.config, images, task.world), len(images)
    if split == "train":
        raise UserError(
            f"--split is train, but the task {task.config.task} evaluates its validation samples alone: leave it out."
        )
    unused, loader = task.loaders()
    unused.close()
    return loader, len(task.splits[1])


def _shown(about: dict[str, Any], found: dict[str, float | None]) -> str:
    values = {name: "not finite" if value is None else f"{value:.6g}" for name, value in found.items()}
    most = max(map(len, values))
    rows = [f"  {name:{most}s}  {value}" for name, value in values.items()]
    return "\n".join([f"{about['checkpoint']} of {about['run']}, {about['split']}:", *rows])
