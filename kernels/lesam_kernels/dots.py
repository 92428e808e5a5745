"""Inner products of two columns of gradients, for methods that decompose one along the other."""
# ruff: noqa: N803, N806 (constexprs are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesam_kernels.alignment import pointer, vectorised
from lesam_kernels.launch_config import NUM_WARPS
from lesam_kernels.program import is_last, locate, segment_of
from lesam_kernels.tensor_table import GRAD_COLUMNS, TensorTable

_FINISH_BLOCK = 1024


@triton.jit
def _dots_span(sums, addresses, start, first, last, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The three sums + those of elements [first, last) from ``start``."""
    ab, aa, bb = sums
    a_address, b_address = addresses
    a_ptr = pointer(a_address, DTYPE, ALIGNED) + start
    b_ptr = pointer(b_address, DTYPE, ALIGNED) + start
    # Element i goes to lane i % BLOCK in every span, so that the bits do not depend on the alignment.
    for o in range(first // BLOCK * BLOCK, last, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < last if ALIGNED else (off >= first) & (off < last)
        a = tl.load(a_ptr + off, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + off, mask=mask, other=0.0).to(tl.float32)
        ab, aa, bb = tl.fma(a, b, ab), tl.fma(a, a, aa), tl.fma(b, b, bb)
    return ab, aa, bb


@triton.jit
def _finish_sum(partials_ptr, sum_ptr, num_blocks, BLOCK: tl.constexpr):
    """The sum of every third partial, in fp64 and in a fixed order."""
    acc = tl.zeros([BLOCK], tl.float64)
    for o in range(0, num_blocks, BLOCK):
        off = o + tl.arange(0, BLOCK)
        # .cg: from the cache that all programs share, where the others' partials are.
        partial = tl.load(partials_ptr + 3 * off, mask=off < num_blocks, other=0.0, cache_modifier=".cg")
        acc += partial.to(tl.float64)
    tl.store(sum_ptr, tl.sum(acc))


@triton.jit(do_not_specialize_on_alignment=["partials_ptr", "sum_ptr"])
def _dots_kernel(
    a_ptrs,
    b_ptrs,
    rows_ptr,
    blocks_ptr,
    partials_ptr,
    ticket_ptr,
    sum_ptr,
    TYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    FINISH_BLOCK: tl.constexpr,
):
    """sums = (sum of a*b, of a^2, of b^2) over the rows that have both.

    TYPES has (dtype, BLOCK) of each segment. Per element: reads a and b. Products and sums in fp32
    within a chunk, in a fixed order, beyond in fp64.
    """
    block = tl.program_id(0)
    row, start, count = locate(rows_ptr, blocks_ptr, block, CHUNK)
    segment = segment_of(rows_ptr, row)
    a_address, b_address = tl.load(a_ptrs + row), tl.load(b_ptrs + row)
    count = tl.where((a_address != 0) & (b_address != 0), count, 0)
    vector_count = vectorised(a_address | b_address, count)
    addresses = a_address, b_address
    ab, aa, bb = 0.0, 0.0, 0.0
    for i in tl.static_range(len(TYPES)):
        if segment == i:
            DTYPE: tl.constexpr = TYPES[i][0]
            BLOCK: tl.constexpr = TYPES[i][1]
            zeros = tl.zeros([BLOCK], tl.float32)
            sums = _dots_span((zeros, zeros, zeros), addresses, start, 0, vector_count, DTYPE, BLOCK, True)
            sums = _dots_span(sums, addresses, start, vector_count, count, DTYPE, BLOCK, False)
            ab, aa, bb = tl.sum(sums[0]), tl.sum(sums[1]), tl.sum(sums[2])
    tl.store(partials_ptr + 3 * block, ab)
    tl.store(partials_ptr + 3 * block + 1, aa)
    tl.store(partials_ptr + 3 * block + 2, bb)
    if is_last(ticket_ptr):
        for i in tl.static_range(3):
            _finish_sum(partials_ptr + i, sum_ptr + i, tl.num_programs(0), FINISH_BLOCK)
        tl.store(ticket_ptr, 0)


def dots(table: TensorTable, a: str, b: str) -> Tensor:
    """``(sum of a*b, sum of a^2, sum of b^2)`` over the elements of two columns of gradients.

    Accumulated in float32 per chunk and in float64 beyond, in an order that depends on the table alone: equal values
    give equal bits. One launch whatever the dtypes, no host sync.

    Args:
        table: rows without a tensor in either column count nothing.
        a, b: two of `GRAD_COLUMNS`.

    Returns:
        New float64 (3,) on the table's device. Not finite where an element that counts is not.

    Raises:
        ValueError: a column is none of gradients, or not set.
    """
    for column in (a, b):
        if column not in GRAD_COLUMNS:
            raise ValueError(f"dots takes columns of gradients, of {GRAD_COLUMNS}; got {column!r}.")
    a_ptrs, b_ptrs = table.column(a), table.column(b)
    if not table.num_blocks:
        return torch.zeros(3, dtype=torch.float64, device=table.device)
    result = torch.empty(3, dtype=torch.float64, device=table.device)
    with table.device_guard():
        table.launch(
            _dots_kernel,
            table.num_blocks,
            a_ptrs,
            b_ptrs,
            table.rows,
            table.blocks,
            torch.empty(3 * table.num_blocks, dtype=torch.float32, device=table.device),
            table.ticket,
            result,
            TYPES=table.types,
            CHUNK=table.chunk,
            FINISH_BLOCK=_FINISH_BLOCK,
            num_warps=NUM_WARPS,
        )
    return result
