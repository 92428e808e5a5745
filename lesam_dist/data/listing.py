"""A data set's images as arrays in one file, which all processes of a node map into memory and so have once.

Both `lesam-dist index` and `lesam-dist pack` write one. It is a safetensors file: arrays, and a text of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from lesam_dist.errors import UserError

FORMAT = 1
_NAME_BYTES = np.iinfo(np.int32).max  # of all names of a split together, so that their ends are int32

Arrays = Mapping[str, NDArray[Any]]


class Paths(Sequence[str]):
    """The paths of a split's images, each made when it is asked for: a list of 1.28 million takes 130 MiB.

    Args:
        folder: of the split, with what separates it from the class.
        classes: names in label order.
        labels: ``(N,)``.
        names: of the images' files, one behind the other, as the file system has them: uint8.
        ends: of each name in ``names``, ``(N,)``.
        chosen: the samples, int64; None: all.
    """

    def __init__(
        self,
        folder: str,
        classes: Sequence[str],
        labels: NDArray[Any],
        names: NDArray[np.uint8],
        ends: NDArray[Any],
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._folder, self._classes, self._labels = folder, classes, labels
        self._names, self._ends, self._chosen = names, ends, chosen

    def __len__(self) -> int:
        return len(self._ends) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i = index % len(self) if self._chosen is None else int(self._chosen[index])
        begin = int(self._ends[i - 1]) if i else 0
        name = os.fsdecode(self._names[begin : int(self._ends[i])].tobytes())
        return f"{self._folder}{self._classes[self._labels[i]]}/{name}"

    def take(self, samples: NDArray[np.int64]) -> Paths:
        """Those of some samples alone."""
        chosen = samples if self._chosen is None else self._chosen[samples]
        return Paths(self._folder, self._classes, self._labels, self._names, self._ends, chosen)


def names_of(paths: Iterable[str]) -> dict[str, NDArray[Any]]:
    """``names`` and ``ends`` of `Paths`.

    Raises:
        UserError: they are longer than 2 GiB together.
    """
    names = [os.fsencode(os.path.basename(path)) for path in paths]
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    if len(ends) and ends[-1] > _NAME_BYTES:
        raise UserError(f"the names of {len(ends)} images have {ends[-1]} bytes together: shorten them below 2 GiB.")
    return {"names": np.frombuffer(b"".join(names), np.uint8), "ends": ends.astype(np.int32)}


@dataclass(frozen=True)
class Listing:
    """What the file holds.

    Attributes:
        facts: what is no array, as JSON has it.
        arrays: by name; on reading they are views of the file.
    """

    facts: dict[str, Any]
    arrays: Arrays

    def write(self, file: Path) -> None:
        """Write it aside, then in place of what is there.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        facts = {**self.facts, "format": FORMAT, "checksum": _checksum(arrays)}
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            # As bytes: the library would make a file that nobody else may read.
            aside.write_bytes(save(arrays, metadata={"lesam_dist": json.dumps(facts)}))
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """Whether the arrays are those that were written; reads all of them."""
        return bool(_checksum(self.arrays) == self.facts.get("checksum"))


def read_listing(file: Path) -> Listing:
    """Map a file that `Listing.write` made; its arrays are read when they are looked at.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:  # torch's tensors are views, NumPy's would be copies
            facts = json.loads((opened.metadata() or {}).get("lesam_dist", "null"))
            arrays = {name: opened.get_tensor(name).numpy() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"it is cut off, or no file of lesam-dist ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise ValueError("it is no file of lesam-dist")
    if facts["format"] != FORMAT:
        raise ValueError(f"it is of format {facts['format']}, and this lesam-dist knows {FORMAT}")
    return Listing(facts, arrays)


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()
