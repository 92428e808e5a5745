"""Pointer tables on the device: how one launch reaches every tensor of a list."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lesam_kernels.launch_config import CHUNK, MAX_BLOCK, SUPPORTED_DTYPES

# Everything but the address that a kernel or a check depends on.
_Layout = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]


class Group(NamedTuple):
    """A run of blocks whose tensors share their dtypes, list by list: one launch of a typed kernel."""

    dtypes: tuple[torch.dtype, ...]
    first_block: int
    num_blocks: int


class TensorTable:
    """Device pointer tables for k parallel lists of N tensors.

    The caller (an optimizer) owns the table and calls `update` before each launch. The table keeps the
    tensors alive from `update` to the launch, and beyond it only those that are written: it does not hold
    gradients back. `update` and the launches belong on one stream.

    Attributes:
        addresses: int64 (n, k), row t holds the addresses of the t-th non-empty tensors of all lists.
        numels: int64 (n,), elements of row t.
        dtype_codes: int32 (n,), position of the first list's dtype in `SUPPORTED_DTYPES`.
        block_tensor: int32 (num_blocks,), the row that a block works on.
        block_chunk: int32 (num_blocks,), which chunk of ``chunk`` elements of that row.
        groups: the blocks by dtypes, in order.
        written: the tensors of the first list when there are several (kernels write that one), else empty.
    """

    def __init__(self, device: torch.device | str, chunk: int = CHUNK) -> None:
        """An empty table.

        Args:
            device: where all tensors are.
            chunk: elements per block, a multiple of `MAX_BLOCK`; small ones are for tests.

        Raises:
            ValueError: ``chunk`` is not such a multiple.
        """
        if chunk <= 0 or chunk % MAX_BLOCK:
            raise ValueError(f"chunk is {chunk}; it must be a positive multiple of {MAX_BLOCK}.")
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        self.chunk = chunk
        self.written: tuple[Tensor, ...] = ()
        self._held: list[tuple[Tensor, ...]] = []
        self._layouts: list[list[_Layout]] = []
        self._rows: list[int] = []
        self._addresses: list[int] = []
        self._build([], [], [])

    @property
    def num_lists(self) -> int:
        """How many parallel lists the last `update` gave."""
        return len(self._layouts)

    @property
    def num_blocks(self) -> int:
        return len(self.block_tensor)

    def update(self, *lists: Sequence[Tensor]) -> None:
        """Make the table describe ``lists``; cheap when little or nothing changed since the last call.

        Rebuilds when the number of tensors or a tensor's shape, strides, dtype or device changed, refreshes
        the addresses in place where only they changed (new gradients), and else copies nothing. Empty
        tensors are skipped, and a list may be empty. No host sync: staging memory is pinned and new for each
        copy, so that torch does not reuse it before the copy ran.

        Args:
            lists: at least one; the i-th tensors of all lists agree in elements and strides, so that walking
                their memory pairs the right elements. Any shapes and alignment; float32, bfloat16, float16.

        Raises:
            TypeError: a tensor's dtype is not supported.
            ValueError: no list; lists that differ in length, or at an index in elements or strides; a tensor
                on another device, not dense in memory, or without memory of its own. The table is unchanged.
            RuntimeError: a copy is needed while a CUDA graph is captured.
        """
        if not lists:
            raise ValueError("no list of tensors was given.")
        layouts = [[(t.dtype, t.device, t.shape, t.stride()) for t in tensors] for tensors in lists]
        changed = layouts != self._layouts
        if changed:
            _check(layouts, self.device)
        rows = _rows(layouts) if changed else self._rows
        addresses = [tensors[row].data_ptr() for row in rows for tensors in lists]
        if changed or addresses != self._addresses:
            self._check_copy(rows, addresses, len(lists))
            if changed:
                self._build(layouts, rows, addresses)
            else:
                self.addresses.copy_(self._stage(addresses).view_as(self.addresses), non_blocking=True)
            self._addresses = addresses
        self._held = [tuple(tensors) for tensors in lists]
        self.written = self._held[0] if len(lists) > 1 else ()

    def release(self) -> None:
        """Let go of the tensors that are only read or private: called by each launch, once it is queued."""
        self._held = []

    def device_guard(self) -> AbstractContextManager[object]:
        """Makes the table's device current: Triton launches on the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _build(self, layouts: list[list[_Layout]], rows: list[int], addresses: list[int]) -> None:
        dtypes = [tuple(layout[row][0] for layout in layouts) for row in rows]
        numels = [layouts[0][row][2].numel() for row in rows]
        chunks_of = torch.tensor([-(-numel // self.chunk) for numel in numels], dtype=torch.int64)
        block_tensor = torch.repeat_interleave(chunks_of)
        first_blocks = chunks_of.cumsum(0) - chunks_of
        block_chunk = torch.arange(len(block_tensor)) - first_blocks[block_tensor]

        self.addresses = self._to_device(self._stage(addresses).view(len(rows), len(layouts)))
        self.numels = self._to_device(self._stage(numels))
        codes = torch.tensor([SUPPORTED_DTYPES.index(key[0]) for key in dtypes], dtype=torch.int32)
        self.dtype_codes = self._to_device(codes)
        self.block_tensor = self._to_device(block_tensor.int())
        self.block_chunk = self._to_device(block_chunk.int())

        groups, first_block = [], 0
        for key, run in groupby(zip(dtypes, chunks_of.tolist(), strict=True), key=lambda row: row[0]):
            num_blocks = sum(chunks for _, chunks in run)
            groups.append(Group(key, first_block, num_blocks))
            first_block += num_blocks
        self.groups = tuple(groups)
        self._layouts, self._rows = layouts, rows

    def _stage(self, values: list[int]) -> Tensor:
        return self._pin(torch.tensor(values, dtype=torch.int64))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return self._pin(tensor).to(self.device, non_blocking=True)

    def _pin(self, tensor: Tensor) -> Tensor:
        """From pageable memory a copy would wait for the device."""
        return tensor.pin_memory() if self.device.type == "cuda" and tensor.numel() else tensor

    def _check_copy(self, rows: list[int], addresses: list[int], num_lists: int) -> None:
        if 0 in addresses:
            position = addresses.index(0)
            raise ValueError(
                f"tensor {rows[position // num_lists]} of list {position % num_lists} has no memory of its "
                "own (a DTensor, or a meta or fake tensor); pass its local tensor."
            )
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the tensors changed while a CUDA graph is captured, and the graph would replay a copy from "
                "freed memory. Update it before the capture; keep gradients in place (set_to_none=False)."
            )


def _rows(layouts: list[list[_Layout]]) -> list[int]:
    """Indices of the non-empty tensors, those of equal dtypes together."""
    keys = [tuple(layout[0] for layout in column) for column in zip(*layouts, strict=True)]
    first_seen = {key: position for position, key in reversed(list(enumerate(keys)))}
    filled = [index for index, layout in enumerate(layouts[0]) if layout[2].numel()]
    return sorted(filled, key=lambda index: first_seen[keys[index]])


def _check(layouts: list[list[_Layout]], device: torch.device) -> None:
    lengths = [len(layout) for layout in layouts]
    if len(set(lengths)) > 1:
        raise ValueError(f"the lists have {lengths} tensors; parallel lists have equally many.")
    for index, column in enumerate(zip(*layouts, strict=True)):
        for position, layout in enumerate(column):
            _check_tensor(f"tensor {index} of list {position}", layout, column[0], device)


def _check_tensor(name: str, layout: _Layout, first: _Layout, device: torch.device) -> None:
    """Check one tensor, called ``name`` in messages, by itself and against the one of the first list."""
    dtype, where, shape, strides = layout
    if dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"{name} is {dtype}; supported dtypes are {supported}. Convert it or leave it out.")
    if where != device:
        raise ValueError(f"{name} is on '{where}', the table on '{device}'; use one table per device.")
    if shape.numel() != first[2].numel():
        raise ValueError(
            f"{name} has {shape.numel()} elements (shape {tuple(shape)}), but the one of list 0 has "
            f"{first[2].numel()} (shape {tuple(first[2])})."
        )
    if shape.numel() == 0:
        return
    if not _is_dense(shape, strides):
        raise ValueError(
            f"{name} is not dense in memory (shape {tuple(shape)}, strides {strides}); pass a dense tensor, "
            "e.g. its clone(memory_format=torch.contiguous_format)."
        )
    if _order(shape, strides) != _order(first[2], first[3]):
        raise ValueError(
            f"{name} has shape {tuple(shape)} and strides {strides}, but the one of list 0 has shape "
            f"{tuple(first[2])} and strides {first[3]}: their elements do not lie in the same order. Give "
            "both one memory format."
        )


def _order(shape: torch.Size, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """The dims that decide where elements lie: the stride of a dim of size 1 means nothing."""
    return [(stride, size) for size, stride in zip(shape, strides, strict=False) if size > 1]


def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dims."""
    if len(shape) != len(strides):  # a sparse tensor
        return False
    expected = 1
    for stride, size in sorted(_order(shape, strides)):
        if stride != expected:
            return False
        expected *= size
    return True
