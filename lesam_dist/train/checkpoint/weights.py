"""The weights of a checkpoint alone, in one process and without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lesam_dist.errors import UserError
from lesam_dist.train.checkpoint.folder import Folder, folder_in
from lesam_dist.train.checkpoint.loading import read_whole, reason
from lesam_dist.train.checkpoint.manifest import NAME, DamagedError


def checkpoint_in(path: Path) -> Path:
    """The folder of a checkpoint: this one, or the latest of the run in it.

    Raises:
        UserError: where there is none.
    """
    if (path / NAME).is_file():
        return path
    found = Folder(folder_in(path))
    names = found.candidates()
    if not names:
        raise UserError(f"'{path}' is no checkpoint (it has no {NAME}), and no run that has one: look at its name.")
    return found.path / names[0]


def weights_of(checkpoint: Path, *, averaged: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and buffers by the names of the model's state_dict(), on the host, and the checkpoint's manifest.

    Args:
        checkpoint: its folder.
        averaged: their averages in place of those that have one, as the run evaluates both.

    Raises:
        UserError: it is damaged, or of a later version; there are no averages in it.
    """
    try:
        tensors, content = read_whole(checkpoint)
    except DamagedError as error:
        raise UserError(f"{error}. lesam-dist checkpoints --verify says which are whole.") from error
    except (OSError, RuntimeError, CheckpointException) as error:  # no memory, and what is forged in format 1
        raise UserError(f"the checkpoint {checkpoint} cannot be read: {reason(error)}.") from error
    return _weights(tensors, checkpoint, averaged=averaged), content


def _weights(tensors: dict[str, Tensor], source: Path, *, averaged: bool) -> dict[str, Tensor]:
    weights = _part(tensors, "model.")
    if averaged:
        averages = _part(tensors, "ema.")
        if not averages:
            raise UserError(
                f"{source} has no averaged weights: the run kept no average. Leave out --ema (or init_from_ema)."
            )
        weights = {name: averages.get(name, tensor).to(tensor.dtype) for name, tensor in weights.items()}
    if not weights:
        raise UserError(f"{source} holds no model.")
    return weights


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
