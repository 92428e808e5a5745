"""A new run that starts from the weights of another one: its network's, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError
from lesam_dist.models.pretrained import last_layer
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.agreement import agree_on_weights
from lesam_dist.train.checkpoint.weights import checkpoint_in, weights_of
from lesam_dist.train.class_names import read_classes
from lesam_dist.train.source import digest_of, misfit, read_weights_file


def start_from(config: Config, model: nn.Module, world: Distributed, classes: Sequence[str] | None) -> str:
    """Copy the weights and buffers of ``init_from`` into a model that is not wrapped yet; on all processes.

    The last layer is taken too where it fits and is not known to be of other classes; else it stays fresh, as under
    torchvision's pretrained weights.

    Args:
        config: of the run that begins.
        model: its network.
        world: this process among all.
        classes: of its data, in label order; None where they have no names.

    Returns:
        What was taken, in one line.

    Raises:
        UserError: there are no such weights, or they are of another network.
        SharedError: other processes have found others there.
    """
    assert config.init_from is not None
    path = Path(config.init_from)
    if path.is_file():
        if config.init_from_ema:
            raise UserError(
                f"init_from_ema is true but init_from is '{path}', a file of weights: averaged ones are a checkpoint's."
            )
        name, folder, weights = path.name, path.parent, read_weights_file(path)
    else:
        checkpoint = checkpoint_in(path)
        weights, _ = weights_of(checkpoint, averaged=config.init_from_ema)
        folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
        name = checkpoint.name + (" (averaged weights)" if config.init_from_ema else "")
    agree_on_weights(digest_of(weights), world)
    fresh = _copy(weights, model, config, _are_others(read_classes(folder), classes))
    return f"init_from: starts from {name} in '{folder}', with a fresh optimizer{fresh}"


def _are_others(there: Sequence[str] | None, here: Sequence[str] | None) -> bool:
    return there is not None and here is not None and list(there) != list(here)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: nn.Module, config: Config, other_classes: bool) -> str:
    """What to say of the last layer."""
    own, head = model.state_dict(), last_layer(model)
    mine, theirs = (
        {name: tensor for name, tensor in state.items() if name.startswith(f"{head}.")} for state in (own, weights)
    )
    why = "of other classes" if other_classes else misfit(mine, theirs)
    left_out = {*mine, *theirs} if why else set()
    wanted, found = (
        {name: tensor for name, tensor in state.items() if name not in left_out} for state in (own, weights)
    )
    if wrong := misfit(wanted, found):
        raise UserError(
            f"init_from is '{config.init_from}', whose weights are not of model.name {config.model.name}: {wrong}. "
            "Give the settings of the network that it was trained with, or leave init_from out."
        )
    for name, tensor in wanted.items():  # in place, as they may lie in a certain format
        tensor.copy_(found[name])
    return f"; the last layer '{head}' is fresh, as the one there is not this one's: {why}" if why else ""
