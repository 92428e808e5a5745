"""What an analysis is of: the weights of a checkpoint in the model that they are of, and images."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.config.command_line import read_command_line
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.data import build_evaluation_loader
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.loading import build_task
from lesam_dist.train import build
from lesam_dist.train.checkpoint.weights import checkpoint_in, weights_of
from lesam_dist.train.randomness import some_of


@dataclass(frozen=True)
class Source:
    """Weights on the host, and the run that they are of.

    Attributes:
        name: of the checkpoint, as ``step_00000240``, or of the file.
        folder: of the run; of a file, the one that it lies in.
        weights: by the names of the model's state_dict().
        config: of the run.
        about: epoch and step, where they are known.
    """

    name: str
    folder: Path
    weights: dict[str, Tensor]
    config: Config
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of all weights: another checkpoint under the same name has another one."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode() + b"\0")
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()


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


def read_source(path: Path, config: str | None = None, flags: Sequence[str] = (), *, averaged: bool = False) -> Source:
    """Weights, and the config of their run with ``flags`` of `lesam-dist train` over it.

    Args:
        path: folder of a checkpoint; of a run, for its latest one; or a file of a model's state_dict, in the
            safetensors format or torch's, of which nothing but tensors is loaded.
        config: a recipe's name or YAML file that a file's model and images are of.
        flags: as ``["--data.root", "elsewhere"]``.
        averaged: the run's averaged weights.

    Raises:
        UserError: there is none, it is damaged, or not what it is said to be.
    """
    if path.is_file():
        if config is None:
            raise UserError(
                f"'{path}' is a file of weights: say which model and images it is of, with --config NAME_OR_FILE."
            )
        if averaged:
            raise UserError(f"'{path}' is a file of weights, and averaged ones are a checkpoint's: leave out --ema.")
        return Source(path.stem, path.parent, _read_file(path), _config_of(config, flags))
    if config is not None:
        raise UserError(
            f"--config is for a file of weights, and '{path}' is a folder: leave it out, as a checkpoint has its own."
        )
    checkpoint = checkpoint_in(path)
    weights, content = weights_of(checkpoint, averaged=averaged)
    if not isinstance(content.get("config"), dict):
        raise UserError(f"the checkpoint {checkpoint} says nothing of the run that it is of: it is no run's of ours.")
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    name = checkpoint.name + ("-ema" if averaged else "")
    about: dict[str, Any] = {key: content[key] for key in ("step", "epoch") if key in content}
    return Source(name, folder, weights, _config_of(_as_yaml(content["config"]), flags), about)


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
        source: from `read_source`.
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
    task = _image_task(source, config, world)
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


def build_with(source: Source, num_classes: int, world: Distributed) -> nn.Module:
    """The model of a source's config with its weights, in eval mode.

    Raises:
        UserError: they are not of that model.
    """
    config = plain(source.config)
    task = _image_task(source, config, world)
    task.num_classes = num_classes
    model = build.build_model(task)
    if wrong := misfit(model.state_dict(), source.weights):
        raise UserError(
            f"{source.name} in '{source.folder}' is not of model.name {config.model.name} with {num_classes} classes: "
            f"{wrong}. Give the config, and the data, that it was trained with."
        )
    model.load_state_dict(source.weights)
    return model.float().eval()


def _image_task(source: Source, config: Config, world: Distributed) -> ImageTask:
    task = build_task(config, world)
    if not isinstance(task, ImageTask):
        raise UserError(
            f"{source.name} in '{source.folder}' is of the task {config.task}, which is none on images: analyses are "
            "of image classifiers."
        )
    return task


def plain(config: Config) -> Config:
    """The config for a process that computes alone in float32: without sharding, compilation, or less memory."""
    return replace(
        config,
        model=replace(config.model, compile=False, activation_checkpointing=False, pretrained=False),
        parallel=replace(config.parallel, strategy="none", sync_batchnorm=False, wrap_classes=[]),
        precision=replace(config.precision, compute="fp32", weights="fp32", gather_dtype="fp32", tf32=False),
        dry_run=False,
    )


def _config_of(text: str, flags: Sequence[str]) -> Config:
    return read_command_line(["--config", text, *flags]).config


def _as_yaml(leaves: Mapping[str, Any]) -> str:
    """A flattened config as YAML; what a version before this one called otherwise is read as it was then."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return str(yaml.safe_dump(tree, sort_keys=False))


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"'{path}' cannot be read as a model's state_dict: {reason}.") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"'{path}' is no model's state_dict, which has nothing but tensors by name: save that alone.")
    return found


def misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first thing in which weights differ from what a model has; "" where they do not."""
    for name, tensor in wanted.items():
        if name not in found:
            return f"it has no {name}"
        if found[name].shape != tensor.shape:
            return f"its {name} has the shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
    return next((f"its {name} is not in that model" for name in found if name not in wanted), "")
