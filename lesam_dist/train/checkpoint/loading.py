"""A checkpoint on its way back: every file verified by one rank, then each takes what it needs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.optim import Optimizer

from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import format1, manifest, payload, storage
from lesam_dist.train.checkpoint import index as index_file
from lesam_dist.train.checkpoint.index import Index
from lesam_dist.train.checkpoint.manifest import DamagedError, Files
from lesam_dist.train.checkpoint.values import put_back, split

# What `RunState.own` calls the buffers of the model and of the averages, and what a checkpoint's state calls them.
_OWN_BUFFERS = {"buffer": "model", "ema": "ema"}


@dataclass(frozen=True)
class Verified:
    """A checkpoint whose files are those that were written. ``index``: None in format 1."""

    path: Path
    content: dict[str, Any]
    files: Files
    index: Index | None

    @property
    def progress(self) -> dict[str, Any]:
        """What the run saved with it."""
        return manifest.progress_of(self.content)


def verified(checkpoint: Path, world: Distributed) -> Verified:
    """Read a checkpoint's manifest and index and verify all files, each rank a share of them.

    Raises:
        DamagedError: on every rank, with what is wrong with which file.
        SharedError: it is of a later version.
    """
    found: Any = None
    if world.is_main:
        try:
            content, files = manifest.read(checkpoint)
            found = content, files, manifest.format_of(checkpoint, content)
            manifest.check_no_others(checkpoint, files)
        except (DamagedError, UserError) as error:
            found = error
    found = world.share(found)
    if isinstance(found, DamagedError):
        raise found
    if isinstance(found, UserError):
        raise SharedError(str(found))
    content, files, version = found
    index, fault = _verify_share(checkpoint, files, version, world)
    fault = next((text for text in world.gather(fault) if text is not None), None)
    if fault is not None:
        raise DamagedError(fault)
    return Verified(checkpoint, content, files, index)


def load_into(
    found: Verified, state: dict[str, Any], model: nn.Module, optimizer: Optimizer, world: Distributed
) -> dict[str, Tensor]:
    """Load a verified checkpoint into a state's tensors and the objects that it is of; returns what is this rank's own.

    Raises:
        SharedError: where it is of another model or optimizer.
    """
    own: dict[str, Tensor] = {}
    try:
        if found.index is None:
            storage.load_tensors(format1.Reader(found.path, found.files), state, format1.Planner())
        else:
            tensors, _ = split(state)
            storage.load_tensors(storage.Reader(found.path, found.index), tensors)
            put_back(state, found.content["values"])
            own = storage.read_own(found.path, found.index, world.rank, world.world_size)
    except (OSError, CheckpointException, pickle.UnpicklingError, SharedError) as error:
        raise SharedError(f"the checkpoint {found.path} cannot be loaded into this run: {reason(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return own


def read_whole(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, unsharded, by name (``model.``, ``optimizer.``, ``ema.``), and its manifest.

    In one process, on the host, without the model. Buffers that each rank has for itself are the mean over all; the
    rest that they have for themselves is left out.

    Raises:
        DamagedError: with what is wrong with which file.
        UserError: it is of a later version.
    """
    alone = Distributed(0, 0, 1, torch.device("cpu"))
    found = verified(checkpoint, alone)
    reader = format1.Reader(checkpoint, found.files) if found.index is None else storage.Reader(checkpoint, found.index)
    tensors = storage.read_all(reader)
    for name, mean in storage.read_mean(checkpoint, found.index).items() if found.index else ():
        kind, _, rest = name.partition(".")
        whole = f"{_OWN_BUFFERS.get(kind)}.{rest}"
        if whole in tensors and tensors[whole].shape == mean.shape:
            tensors[whole] = mean.to(tensors[whole].dtype)
    return tensors, found.content


def reason(error: BaseException) -> str:
    """The first line of the deepest cause: torch.distributed.checkpoint wraps what went wrong on which rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _verify_share(checkpoint: Path, files: Files, version: int, world: Distributed) -> tuple[Index | None, str | None]:
    names = sorted(files)[world.rank :: world.world_size]
    try:
        manifest.verify(checkpoint, {name: files[name] for name in names})
        if version == 1:
            if world.is_main:
                format1.check(checkpoint, files)
            return None, None
        if index_file.NAME not in files:
            raise DamagedError(f"{checkpoint} has no {index_file.NAME}")
        path = checkpoint / index_file.NAME
        index = index_file.parse(path, manifest.read_verified(path, files[index_file.NAME]), files)
        held = index.by_file()
        for name in names:
            if name != index_file.NAME:
                payload.check_header(checkpoint / name, held.get(name, {}))
    except DamagedError as error:
        return None, str(error)
    return index, None
