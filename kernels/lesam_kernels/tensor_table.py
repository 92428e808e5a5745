"""Pointer tables on the device: how one launch reaches every tensor of an optimizer."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesam_kernels import capture
from lesam_kernels.launch import Launcher
from lesam_kernels.launch_config import CHUNK, MAX_BLOCK, NUM_WARPS, TRITON_DTYPES, block_of
from lesam_kernels.layout import (
    Layout,
    check_dense,
    check_device,
    check_dtype,
    check_memory,
    check_parallel,
    guard_of,
)

PARAM_COLUMNS = ("w", "copy", "momentum_buffer", "exp_avg", "exp_avg_sq")
"""The parameter and what is kept of it."""

GRAD_COLUMNS = ("g", "g_hat", "g_kept", "ema")
"""Gradients: first pass, second pass, a saved first one, its moving average."""

STEP_COLUMN = "step"
"""The column of 0-d float32 step counts, as in torch.optim's state."""


class Segment(NamedTuple):
    """A run of rows of one dtype: one launch of an elementwise kernel.

    ``constants`` is what such a launch passes by name, prepared once.
    """

    dtype: torch.dtype
    first_row: int
    num_rows: int
    first_block: int
    num_blocks: int
    constants: dict[str, Any]


class _Column(NamedTuple):
    buffer: Tensor
    addresses: list[int | None]  # of all parameters, empty ones too
    missing: frozenset[int]  # the rows without a tensor
    in_graph: bool = False  # a captured graph reads the buffer: it is not written again


class TensorTable:
    """Addresses on the device: a row per parameter, a column per kind of tensor (weights, gradients, state).

    The caller (an optimizer) owns the table: it calls `build` once, `set` whenever tensors may have moved, and the
    launches. The table keeps the parameters alive and nothing else: what `set` is given must live until the launches
    that use it are queued. All of these calls belong on one stream.

    While a CUDA graph is captured, `set` notes addresses instead of copying them: gradients may be new in each pass of
    the captured step, since they lie in the graph's memory, where every replay has them. `upload` copies what was noted
    and comes before the first replay. What a graph reads is never overwritten, so launches outside of it, before and
    between replays, do not disturb it; several graphs may be captured.

    Attributes:
        rows: int64 (n, 3): elements, param group and segment of each row.
        blocks: int32 (num_blocks, 2): the row that a program works on, and which chunk of ``chunk`` elements of it.
        segments: the rows by dtype, in order of first appearance.
        types: (dtype, block) of each segment, for a launch over all of them.
        num_groups: rows that per-group scalar tensors must have; at least 1.
        written: the parameters, whose autograd versions the launches increment.
        launch: launches kernels on the table's device.
        partials, ticket: workspace of reductions; the ticket is 0 between launches.
    """

    def __init__(self, device: torch.device | str, chunk: int = CHUNK, walk_back: bool = True) -> None:
        """An empty table.

        Args:
            device: where all tensors are.
            chunk: elements per block, a multiple of `MAX_BLOCK`; small ones are for tests.
            walk_back: launches that write begin at the end, where the sum before them has just left the gradients in
                the L2 cache; False is for benchmarks.

        Raises:
            ValueError: ``chunk`` is not such a multiple.
        """
        if chunk <= 0 or chunk % MAX_BLOCK:
            raise ValueError(f"chunk is {chunk}; it must be a positive multiple of {MAX_BLOCK}.")
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        self.chunk = chunk
        self._walk_back = walk_back
        self.launch = Launcher()
        self.build([], [])

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def build(self, params: Sequence[Tensor], groups: Sequence[int]) -> None:
        """Make a row of each parameter with elements; forgets all columns but "w", which it sets.

        To be called again when a parameter's shape, strides or dtype or its group changed.

        Args:
            params: dense tensors on the table's device, of any shapes and alignment; float32, bfloat16, float16.
            groups: for each, the index of its param group: its row in the scalar tensors that launches take.

        Raises:
            TypeError: a dtype is not supported.
            ValueError: lists that differ in length, a negative group; a tensor on another device, not dense in
                memory, or without memory of its own. The table is unchanged.
            RuntimeError: a CUDA graph is captured. Graphs captured before must not be replayed after this.
        """
        if len(params) != len(groups):
            raise ValueError(f"there are {len(params)} params and {len(groups)} groups; each parameter has one.")
        if min(groups, default=0) < 0:
            raise ValueError(f"groups has {min(groups)}; a group is an index >= 0.")
        layouts = [Layout.of(p) for p in params]
        for index, (p, layout) in enumerate(zip(params, layouts, strict=True)):
            name = f"parameter {index}"
            check_dtype(name, p.dtype)
            check_device(name, p.device, self.device)
            if p.numel():
                check_dense(name, layout)
                check_memory(name, p)
        self._refuse_capture()

        self._layouts, self._dtypes = layouts, [p.dtype for p in params]
        self._passed: dict[str, Callable[..., bool]] = {}
        self._kinds = _kinds_of(params) if all(p.layout == torch.strided for p in params) else None
        self._order = _order_of_rows(self._dtypes, [p.numel() for p in params])
        self.num_groups = max(groups, default=0) + 1
        self._lay_out([self._dtypes[i] for i in self._order], [params[i].numel() for i in self._order], list(groups))
        self.partials = torch.empty(self.num_blocks, dtype=torch.float32, device=self.device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._columns: dict[str, _Column] = {}
        self._of_graphs = capture.GraphLists(len(self._order), self.device)
        self.set("w", params)

    def set(self, column: str, tensors: Sequence[Tensor | None]) -> None:
        """Tell where a column's tensors are; cheap when all addresses are those of the last call.

        Changed addresses are written into the same device buffer, unless a CUDA graph reads it. No host sync: staging
        memory is pinned and new for each copy, so that torch does not reuse it before the copy ran. While a graph is
        captured nothing is copied: call `upload` before the first replay.

        Args:
            column: one of `PARAM_COLUMNS`, `GRAD_COLUMNS` or `STEP_COLUMN`.
            tensors: one per parameter given to `build`, None where there is none; of the parameter's dtype, and with
                its order of elements in memory. Steps are single float32 elements.

        Raises:
            KeyError: no such column.
            TypeError: a tensor has another dtype than its parameter.
            ValueError: another number of tensors than of parameters; a tensor on another device, not dense in memory,
                unlike its parameter in elements or their order, or without memory of its own. The table is unchanged.
            RuntimeError: a captured step has more than `capture.NEW_LISTS` lists of new addresses.
        """
        capturing = capture.is_capturing(self.device)
        if capturing:
            self._give_to_graph()
        elif not self._of_graphs.are_written:
            self._of_graphs.write()
        known = self._columns.get(column)
        # An address that did not change needs no other check: the row's number of elements is that of its parameter,
        # and autograd gives a gradient its parameter's strides.
        try:
            addresses = [None if t is None else t.data_ptr() for t in tensors]
        except RuntimeError:  # a sparse tensor
            addresses = []
        if known is not None and addresses == known.addresses:
            return
        self._check_column(column, tensors, known.addresses if known else [], addresses)
        values = [addresses[i] or 0 for i in self._order]
        if capturing:
            buffer = self._of_graphs.take(values)
        else:
            staged = self._pin(_as_tensor(values))
            if known is None or known.in_graph:
                buffer = staged.to(self.device, non_blocking=True)
            else:
                buffer = known.buffer
                buffer.copy_(staged, non_blocking=True)
        missing = frozenset(i for i in self._order if addresses[i] is None) if None in addresses else frozenset()
        self._columns[column] = _Column(buffer, addresses, missing, in_graph=capturing)
        if column == "w":
            self.written = tuple(t for t in tensors if t is not None)

    def upload(self) -> None:
        """Write the addresses that were noted while CUDA graphs were captured; no host sync, nothing where none were.

        To be called on the replays' stream, before the first replay.
        """
        self._of_graphs.write()

    def clear(self, column: str) -> None:
        """Forget a column; harmless where it is not set."""
        self._columns.pop(column, None)

    def has(self, column: str) -> bool:
        """Whether the column is set."""
        return column in self._columns

    def column(self, name: str) -> Tensor:
        """The addresses, int64 (n,), 0 where a row has no tensor; ValueError where the column is not set."""
        try:
            return self._columns[name].buffer
        except KeyError:
            raise ValueError(f"the table has no column '{name}'; call table.set('{name}', ...) first.") from None

    def column_if_set(self, name: str) -> Tensor | None:
        """As `column`, None where it is not set."""
        return self._columns[name].buffer if name in self._columns else None

    def require(self, name: str, *, where: str) -> None:
        """Raise ValueError unless every row that has a tensor in column ``where`` has one in column ``name``."""
        self.column(name)
        unpaired = self._columns[name].missing - self._columns[where].missing
        if unpaired:
            raise ValueError(f"parameter {min(unpaired)} has a tensor in column '{where}' but none in '{name}'.")

    def device_guard(self) -> AbstractContextManager[object]:
        """Makes the table's device current: Triton launches on the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _lay_out(self, dtypes: list[torch.dtype], numels: list[int], groups: list[int]) -> None:
        """Fill rows, blocks and segments."""
        chunks_of = torch.tensor([-(-numel // self.chunk) for numel in numels], dtype=torch.int64)
        row_of_block = torch.repeat_interleave(chunks_of)
        first_blocks = chunks_of.cumsum(0) - chunks_of
        chunk_of_block = torch.arange(len(row_of_block)) - first_blocks[row_of_block]
        blocks = torch.stack([row_of_block, chunk_of_block], dim=1).int()

        segments: list[Segment] = []
        rows: list[tuple[int, int, int]] = []
        first_block = 0
        for dtype, run in groupby(range(len(dtypes)), key=dtypes.__getitem__):
            members = list(run)
            rows += [(numels[row], groups[self._order[row]], len(segments)) for row in members]
            num_blocks = int(chunks_of[members].sum())
            constants = {
                "DTYPE": TRITON_DTYPES[dtype],
                "CHUNK": self.chunk,
                "BLOCK": block_of(dtype),
                "WALK_BACK": self._walk_back,
                "num_warps": NUM_WARPS,
            }
            segments.append(Segment(dtype, members[0], len(members), first_block, num_blocks, constants))
            first_block += num_blocks
        self.segments = tuple(segments)
        self.types = tuple((s.constants["DTYPE"], s.constants["BLOCK"]) for s in segments)
        self.rows = self._pin(torch.tensor(rows, dtype=torch.int64).view(-1, 3)).to(self.device, non_blocking=True)
        self.blocks = self._pin(blocks).to(self.device, non_blocking=True)

    def _check_column(
        self,
        column: str,
        tensors: Sequence[Tensor | None],
        known: list[int | None],
        addresses: list[int | None],
    ) -> None:
        """Raise for a column or for tensors that the kernels cannot take."""
        if column not in (*PARAM_COLUMNS, *GRAD_COLUMNS, STEP_COLUMN):
            raise KeyError(f"no column is called {column!r}; there are {(*PARAM_COLUMNS, *GRAD_COLUMNS, STEP_COLUMN)}.")
        if len(tensors) != len(self._layouts):
            raise ValueError(
                f"column '{column}' got {len(tensors)} tensors for {len(self._layouts)} parameters; give None where a "
                "parameter has none."
            )
        if None in addresses and column == "w":
            raise ValueError(
                f"column 'w', parameter {addresses.index(None)}: there is no tensor, but each has weights."
            )
        # Gradients may get new addresses in every step, and are else like those of the last one.
        is_guarded = column in GRAD_COLUMNS and bool(addresses) and None not in addresses
        if not is_guarded:
            self._check_each(column, tensors, known, addresses)
        elif not (self._has_memory(addresses) and column in self._passed and self._passed[column](*tensors)):
            self._check_each(column, tensors, [], addresses)
            self._passed[column] = guard_of(tensors)

    def _has_memory(self, addresses: list[int | None]) -> bool:
        """Whether no row's tensor is at address 0."""
        return 0 not in addresses or 0 not in [addresses[i] for i in self._order]

    def _check_each(
        self,
        column: str,
        tensors: Sequence[Tensor | None],
        known: list[int | None],
        addresses: list[int | None],
    ) -> None:
        """Check the tensors whose address is not the known one."""
        unusual: Iterable[int] = range(len(tensors))
        if addresses and self._kinds and column != STEP_COLUMN:
            # What is nearly always so, and quick.
            given: Sequence[Tensor | None] = tensors
            if None in addresses:
                given = [w if t is None else t for t, w in zip(tensors, self.written, strict=True)]
            kinds = _kinds_of(given)
            if kinds == self._kinds and self._has_memory(addresses):
                return
            rows = zip(addresses, zip(*kinds, strict=True), zip(*self._kinds, strict=True), strict=True)
            unusual = [index for index, (address, kind, of_param) in enumerate(rows) if not address or kind != of_param]
        for index in unusual:
            tensor, is_known = tensors[index], bool(known and addresses) and known[index] == addresses[index]
            if tensor is not None and not is_known:
                self._check_tensor(column, index, tensor)

    def _check_tensor(self, column: str, index: int, tensor: Tensor) -> None:
        name, param = f"column '{column}', parameter {index}: the tensor", self._layouts[index]
        if param.shape.numel() == 0:
            return
        if column == STEP_COLUMN:
            if tensor.dtype != torch.float32 or tensor.numel() != 1:
                raise TypeError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a step is one float32 element."
                )
            check_device(name, tensor.device, self.device)
            return
        if tensor.dtype != self._dtypes[index]:
            remedy = "build the table again" if column == "w" else "convert it"
            raise TypeError(f"{name} is {tensor.dtype}, but the parameter {self._dtypes[index]}; {remedy}.")
        layout = Layout.of(tensor)
        check_device(name, layout.device, self.device)
        check_parallel(name, layout, param)
        check_memory(name, tensor)

    def _pin(self, tensor: Tensor) -> Tensor:
        return capture.pinned(tensor, self.device)

    def _give_to_graph(self) -> None:
        """Never write again what a graph that is captured now may read: the columns as they are."""
        for name, column in self._columns.items():
            if not column.in_graph:
                self._of_graphs.add([column.addresses[i] or 0 for i in self._order], column.buffer)
                self._columns[name] = column._replace(in_graph=True)

    def _refuse_capture(self) -> None:
        if capture.is_capturing(self.device):
            raise RuntimeError(
                "the table of parameters would be made while a CUDA graph is captured, and the graph would replay "
                "copies from freed memory. Take a step, or build the table, before the capture."
            )


def _kinds_of(tensors: Sequence[Any]) -> tuple[list[object], ...]:
    """What strided tensors have in common that are made alike, as lists: their comparison is quick.

    Contiguous tensors of one shape have their elements in one order, whatever their strides of size 1 are.
    """
    return (
        [t.dtype for t in tensors],
        [t.shape for t in tensors],
        [t.device for t in tensors],
        [t.is_contiguous() or t.stride() for t in tensors],
    )


def _as_tensor(values: list[int]) -> Tensor:
    """int64; in half the time of torch.tensor."""
    return torch.frombuffer(array("q", values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def _order_of_rows(dtypes: list[torch.dtype], numels: list[int]) -> list[int]:
    """Indices of the non-empty parameters, those of one dtype together."""
    filled = [index for index, numel in enumerate(numels) if numel]
    first_seen = {dtypes[index]: index for index in reversed(filled)}
    return sorted(filled, key=lambda index: first_seen[dtypes[index]])
