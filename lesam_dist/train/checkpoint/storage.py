"""Format 2 of a checkpoint, for torch.distributed.checkpoint: its planners cut and join tensors, this finds the bytes.

torch has a storage of safetensors too, `HuggingFaceStorageReader` and `-Writer` (looked at in 2.14). It knows a part by
its tensor's name alone, so that a file holds one part of each; finds a tensor's size from the parts; takes every file
of the folder; has no place for what a rank owns alone or for what is no tensor; and joins the bytes of a file in
memory before it writes. Here an index says what is where, and is checked before a byte is used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from lesam_dist.train.checkpoint.index import Entry, Index


class Reader(StorageReader):
    """Reads what the index says, which has been verified with all files."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as the planner knows it."""
        return Metadata({name: _metadata(entry) for name, entry in self._index.tensors.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the planned parts to where the planner wants them."""
        by_file: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            entry = self._index.tensors[item.storage_index.fqn]
            chunk = next(chunk for chunk in entry.chunks if chunk.offsets == item.storage_index.offset)
            by_file.setdefault(chunk.file, []).append((chunk.key, item))
        for name, wanted in by_file.items():
            with safe_open(self._folder / name, "pt") as file:
                for key, item in wanted:
                    part = file.get_tensor(key)
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        part = part.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between two loads."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """torch must not choose this reader by itself."""
        return False


def load_tensors(reader: StorageReader, tensors: dict[str, Any], planner: LoadPlanner | None = None) -> None:
    """Load into tensors, whole or sharded, by name; every rank takes part.

    Raises:
        CheckpointException: where one is not in the checkpoint, or of another size; on every rank.
    """
    planner = planner or DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        load(tensors, storage_reader=reader, planner=planner)


def read_all(reader: StorageReader) -> dict[str, Tensor]:
    """All tensors that a reader has, unsharded, on the host; in one process."""
    kinds = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    load_tensors(reader, tensors)
    return tensors


def read_own(folder: Path, index: Index, rank: int, world_size: int) -> dict[str, Tensor]:
    """What a rank saved for itself, on the host.

    On another number of processes than saved it, each gets the mean over all that did of what is floating, and what the
    first has of the rest.
    """
    if len(index.own) == world_size:
        return _read_whole(folder, index.own[rank])
    return read_mean(folder, index)


def read_mean(folder: Path, index: Index) -> dict[str, Tensor]:
    """The mean over all ranks that saved of what is floating in their own, and what the first has of the rest."""
    if not index.own:
        return {}
    first = _read_whole(folder, index.own[0])
    every = [first, *(_read_whole(folder, own) for own in index.own[1:])]
    return {name: _mean(tensor, [own.get(name) for own in every]) for name, tensor in first.items()}


def _read_whole(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        found[name] = torch.empty(entry.size, dtype=entry.dtype)
        for chunk in entry.chunks:  # one, or none where it has no elements
            with safe_open(folder / chunk.file, "pt") as file:
                found[name].copy_(file.get_tensor(chunk.key))
    return found


def _mean(first: Tensor, every: Iterable[Tensor | None]) -> Tensor:
    if not first.is_floating_point():
        return first
    alike = [tensor.double() for tensor in every if tensor is not None and tensor.shape == first.shape]
    return torch.stack(alike).mean(0).to(first.dtype)


def _metadata(entry: Entry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.size), chunks)
