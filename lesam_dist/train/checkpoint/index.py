"""index.json of a checkpoint: the tensors in it, and which part of each lies in which file.

{"tensors": {"model.fc.weight": {"dtype": "F32", "size": [10, 64], "chunks": [
    {"file": "rank_00000.safetensors", "key": "model.fc.weight@0,0", "offsets": [0, 0], "sizes": [5, 64]}, ...]}, ...},
 "own": [{"bn.running_mean": {"dtype": "F32", "size": [64], "chunks": [...]}}, ...]}        by rank
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lesam_dist.train.checkpoint import payload
from lesam_dist.train.checkpoint.manifest import DamagedError

NAME = "index.json"
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, as one tensor in a file: where it begins, and its shape."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor: its boxes fill it, and one without elements has none."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """All tensors of a checkpoint by name; ``own`` has those of one rank alone, by rank."""

    tensors: dict[str, Entry]
    own: list[dict[str, Entry]]

    def by_file(self) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        """What each file holds: dtype and shape by name."""
        found: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        for entries in (self.tensors, *self.own):
            for entry in entries.values():
                for chunk in entry.chunks:
                    found.setdefault(chunk.file, {})[chunk.key] = entry.dtype, chunk.sizes
        return found


def dump(index: Index) -> bytes:
    """As it stands in the file."""
    content = {"tensors": _plain(index.tensors), "own": [_plain(entries) for entries in index.own]}
    return json.dumps(content, separators=(",", ":")).encode()


def parse(path: Path, text: bytes, files: Collection[str]) -> Index:
    """What stands in an index, which may have been written by anybody.

    Args:
        path: of the file, for the message.
        files: those that the checkpoint has; no other is ever opened.

    Raises:
        DamagedError: where it is not an index, or one that cannot be true.
    """
    try:
        content = json.loads(text)
        index = Index(
            {name: _entry(name, item, files) for name, item in content["tensors"].items()},
            [{name: _entry(name, item, files) for name, item in part.items()} for part in content["own"]],
        )
        chunks = [c for part in (index.tensors, *index.own) for entry in part.values() for c in entry.chunks]
        if len({(chunk.file, chunk.key) for chunk in chunks}) != len(chunks):
            raise ValueError("two parts have the same place")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is not the index of a checkpoint ({_one_line(error)})") from error
    return index


def _plain(entries: Mapping[str, Entry]) -> dict[str, Any]:
    return {
        name: {
            "dtype": payload.NAMES[entry.dtype],
            "size": entry.size,
            "chunks": [vars(chunk) for chunk in entry.chunks],
        }
        for name, entry in entries.items()
    }


def _entry(name: str, item: Any, files: Collection[str]) -> Entry:
    size, dtype = _numbers(name, item["size"]), payload.DTYPES[item["dtype"]]
    chunks = tuple(_chunk(name, chunk, size, files) for chunk in item["chunks"])
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the parts of '{name}' do not fill it")
    # Exact where a tensor is cut along one dimension, as FSDP2 does.
    for before, after in pairwise(sorted(chunks, key=lambda chunk: chunk.offsets)):
        if _overlap(before, after):
            raise ValueError(f"two parts of '{name}' overlap")
    return Entry(dtype, size, chunks)


def _chunk(name: str, item: Any, size: tuple[int, ...], files: Collection[str]) -> Chunk:
    chunk = Chunk(item["file"], item["key"], _numbers(name, item["offsets"]), _numbers(name, item["sizes"]))
    if not isinstance(chunk.key, str) or chunk.file not in files:
        raise ValueError(f"'{name}' is said to be in {chunk.file!r}, which is no file of the checkpoint")
    if not len(chunk.offsets) == len(chunk.sizes) == len(size):
        raise ValueError(f"a part of '{name}' has other dimensions")
    inside = all(o + s <= whole for o, s, whole in zip(chunk.offsets, chunk.sizes, size, strict=True))
    if not inside or math.prod(chunk.sizes) == 0:
        raise ValueError(f"a part of '{name}' is empty or lies outside of it")
    return chunk


def _numbers(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= _LARGEST for value in values):
        raise ValueError(f"the size of '{name}' or of a part of it is {values!r}")
    return tuple(values)


def _overlap(a: Chunk, b: Chunk) -> bool:
    dims = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(ao < bo + bs and bo < ao + as_ for ao, as_, bo, bs in dims)


def _one_line(error: Exception) -> str:
    text = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200]
