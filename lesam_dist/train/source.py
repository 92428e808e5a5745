"""The weights of a checkpoint, or of a file, with the config that they are of, and the network that they belong in."""

from __future__ import annotations

import argparse
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

from lesam_dist.config.command_line import read_command_line
from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.loading import build_task
from lesam_dist.tasks.task import Task
from lesam_dist.train import build
from lesam_dist.train.checkpoint.weights import checkpoint_in, weights_of


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
        return digest_of(self.weights)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments by which a command on weights is told which."""
    text = "folder of a run, for its latest checkpoint; of a checkpoint; or a file of a state_dict, with --config"
    parser.add_argument("checkpoint", type=Path, help=text)
    parser.add_argument("--config", help="recipe or YAML file that a file of weights is of")
    parser.add_argument("--ema", action="store_true", help="the averaged weights, of a run that keeps an average")


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """A text that differs for other weights, which lie on the host."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


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
        return Source(path.stem, path.parent, read_weights_file(path), _config_of(config, flags))
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


def build_with(source: Source, num_classes: int, world: Distributed) -> nn.Module:
    """The model of a source's config with its weights, in eval mode.

    Raises:
        UserError: they are not of that model.
    """
    task = image_task(source, plain(source.config), world)
    task.num_classes = num_classes
    return model_of(source, task).float()


def model_of(source: Source, task: Task) -> nn.Module:
    """The network of a task with a source's weights, on the device, in eval mode, in the number format of the task.

    Raises:
        UserError: they are not of that network.
    """
    model = build.build_model(task)
    if wrong := misfit(model.state_dict(), source.weights):
        classes = f" with {task.num_classes} classes" if isinstance(task, ImageTask) else ""
        raise UserError(
            f"{source.name} in '{source.folder}' is not of model.name {task.config.model.name}{classes}: "
            f"{wrong}. Give the config, and the data, that it was trained with."
        )
    model.load_state_dict(source.weights)
    return model.eval()


def image_task(source: Source, config: Config, world: Distributed) -> ImageTask:
    """The task of a source with this config.

    Raises:
        UserError: it is none on images.
    """
    task = build_task(config, world)
    if not isinstance(task, ImageTask):
        raise UserError(
            f"{source.name} in '{source.folder}' is of the task {config.task}, which is none on images: this needs an "
            "image classifier."
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


def unsharded(config: Config) -> Config:
    """As `plain`, in the number formats of the run's own evaluation."""
    return replace(plain(config), precision=replace(config.precision, gather_dtype="fp32"))


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


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """A model's state_dict in the safetensors format or torch's, of which nothing but tensors is loaded.

    Raises:
        UserError: it cannot be read, or is something else.
    """
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
