"""Format 1 of a checkpoint, which version 0.1.0 wrote: torch.distributed.checkpoint's own files, read with care.

torch unpickles `.metadata` and every value that is not a tensor, and a pickle can call anything. Here `.metadata` is
read by an unpickler that knows a closed list of torch's data classes and no other name, and the values by torch's
``weights_only`` loading. Both still follow pickle's instructions, which can then build data of those types alone.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from lesam_dist.train.checkpoint.manifest import DamagedError

_DATA = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),  # from a layout's name to the layout
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # its name in Python 3.13
}


def check(folder: Path, files: Collection[str]) -> None:
    """Raise `DamagedError` where the metadata cannot be read, or asks for what no checkpoint needs."""
    try:
        Reader(folder, files).read_metadata()
    except Exception as error:  # whatever a pickle of data alone can raise
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DamagedError(f"{folder / '.metadata'} cannot be read: {text}") from error


class Reader(FileSystemReader):
    """torch's reader, for a folder whose contents are not trusted.

    Args:
        folder: the checkpoint.
        files: names of the files that may be read; they have been verified.
    """

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        super().__init__(folder)
        self._folder, self._files = folder, files

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, and where.

        Raises:
            pickle.UnpicklingError: for anything but data, or a file that may not be read.
        """
        with (self._folder / ".metadata").open("rb") as file:
            metadata = _DataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError("it is not the metadata of a checkpoint")
        for info in metadata.storage_data.values():
            if info.relative_path not in self._files:
                raise pickle.UnpicklingError(f"it names '{info.relative_path}', which is no file of the checkpoint")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """torch's planner; values that are not tensors may be numbers, texts, None and containers of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put such a value into the state."""
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
