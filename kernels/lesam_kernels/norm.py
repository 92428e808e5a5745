"""Sum of squares over all rows: the squared global gradient norm."""
# ruff: noqa: N803, N806 (constexprs are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesam_kernels.alignment import pointer, vectorised
from lesam_kernels.direction import check_direction, load_direction
from lesam_kernels.launch_config import NUM_WARPS
from lesam_kernels.program import group_of, is_last, load_address, locate, segment_of
from lesam_kernels.tensor_table import GRAD_COLUMNS, TensorTable

_FINISH_BLOCK = 1024


@triton.jit
def _sum_sq_span(
    acc,
    addresses,
    start,
    first,
    last,
    scalars,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    METRIC: tl.constexpr,
    EMA: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """acc + the squares of elements [first, last) from ``start``."""
    w_address, g_address, ema_address = addresses
    p, q, ema_scale = scalars
    g_ptr = pointer(g_address, DTYPE, ALIGNED) + start
    w_ptr = pointer(w_address, DTYPE, ALIGNED) + start
    ema_ptr = pointer(ema_address, DTYPE, ALIGNED) + start
    # Element i goes to lane i % BLOCK in every span, so that the bits do not depend on the alignment.
    for o in range(first // BLOCK * BLOCK, last, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < last if ALIGNED else (off >= first) & (off < last)
        v = tl.load(g_ptr + off, mask=mask, other=0.0).to(tl.float32)
        if EMA:
            v = tl.fma(tl.load(ema_ptr + off, mask=mask, other=0.0).to(tl.float32), -ema_scale, v)
        if METRIC:
            v *= tl.fma(tl.abs(tl.load(w_ptr + off, mask=mask, other=0.0).to(tl.float32)), p, q)
        acc = tl.fma(v, v, acc)
    return acc


@triton.jit
def _finish(partials_ptr, ticket_ptr, sum_sq_ptr, BLOCK: tl.constexpr):
    """sum_sq = sum of partials, in fp64 and in a fixed order."""
    num_blocks = tl.num_programs(0)
    acc = tl.zeros([BLOCK], tl.float64)
    for o in range(0, num_blocks, BLOCK):
        off = o + tl.arange(0, BLOCK)
        # .cg: from the cache that all programs share, where the others' partials are.
        partial = tl.load(partials_ptr + off, mask=off < num_blocks, other=0.0, cache_modifier=".cg")
        acc += partial.to(tl.float64)
    tl.store(sum_sq_ptr, tl.sum(acc))
    tl.store(ticket_ptr, 0)


@triton.jit(do_not_specialize_on_alignment=["metric_ptr", "ema_scale_ptr", "sum_sq_ptr"])
def _sum_sq_kernel(
    g_ptrs,
    w_ptrs,
    ema_ptrs,
    copy_ptrs,
    rows_ptr,
    blocks_ptr,
    metric_ptr,
    ema_scale_ptr,
    partials_ptr,
    ticket_ptr,
    sum_sq_ptr,
    TYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    FINISH_BLOCK: tl.constexpr,
):
    """sum_sq = sum of (T*v)^2, with v and T as in `direction`.

    TYPES has (dtype, BLOCK) of each segment. Per element: reads g; with a metric also w, with an average also ema.
    Squares and sums in fp32 within a chunk, in a fixed order; only the rounding of sums is inexact.
    """
    block = tl.program_id(0)
    row, start, count = locate(rows_ptr, blocks_ptr, block, CHUNK)
    segment = segment_of(rows_ptr, row)
    scalars = load_direction(metric_ptr, ema_scale_ptr, group_of(rows_ptr, row))
    g_address = tl.load(g_ptrs + row)
    METRIC: tl.constexpr = metric_ptr is not None
    EMA: tl.constexpr = ema_scale_ptr is not None
    w_address = load_address(w_ptrs, row)
    ema_address = load_address(ema_ptrs, row)
    addresses = w_address, g_address, ema_address
    counted = g_address != 0
    if copy_ptrs is not None:
        counted = counted & (tl.load(copy_ptrs + row) != 0)
    count = tl.where(counted, count, 0)
    vector_count = vectorised(g_address | w_address | ema_address, count)
    partial = 0.0
    for i in tl.static_range(len(TYPES)):
        if segment == i:
            DTYPE: tl.constexpr = TYPES[i][0]
            # Two vectors per thread where there is one tensor: a kernel that only reads needs more loads under way to
            # cover the memory's latency.
            BLOCK: tl.constexpr = TYPES[i][1] if METRIC or EMA else 2 * TYPES[i][1]
            acc = tl.zeros([BLOCK], tl.float32)
            acc = _sum_sq_span(acc, addresses, start, 0, vector_count, scalars, DTYPE, BLOCK, METRIC, EMA, True)
            acc = _sum_sq_span(acc, addresses, start, vector_count, count, scalars, DTYPE, BLOCK, METRIC, EMA, False)
            partial = tl.sum(acc)
    tl.store(partials_ptr + block, partial)
    if is_last(ticket_ptr):
        _finish(partials_ptr, ticket_ptr, sum_sq_ptr, FINISH_BLOCK)


def sum_sq(
    table: TensorTable,
    column: str,
    *,
    metric: Tensor | None = None,
    ema_scale: Tensor | None = None,
    perturbed_only: bool = False,
) -> Tensor:
    """Sum over all rows of ``(T*v)^2`` with ``v = g - ema_scale*ema``, ``T = p*|w| + q``: a squared norm.

    Without the optional tensors it is the sum of squares of a column. Accumulated in float32 per chunk and in float64
    beyond, in an order that depends on the table alone: equal values give equal bits. One launch whatever the dtypes,
    no host sync.

    Args:
        table: rows without a tensor in ``column`` count nothing.
        column: g, one of `GRAD_COLUMNS`.
        metric: float32 (G, 2), p and q of each param group: (1, eta) is ASAM's. Reads column "w".
        ema_scale: float32 (G,). Reads column "ema", which must have a tensor wherever ``column`` has.
        perturbed_only: rows without a tensor in column "copy" count nothing either.

    Returns:
        New 0-d float64 tensor on the table's device, 0.0 for an empty table. Not finite where any element is
        not, or where a chunk's sum overflows float32 (elements of about 1e19).

    Raises:
        ValueError: ``column`` is none of gradients; a column that is read is not set or lacks a tensor; an argument
            of another shape or device.
        TypeError: an argument is not float32.
    """
    if column not in GRAD_COLUMNS:
        raise ValueError(f"sum_sq takes a column of gradients, one of {GRAD_COLUMNS}; got {column!r}.")
    g_ptrs = table.column(column)
    check_direction(table, metric, ema_scale)
    if ema_scale is not None:
        table.require("ema", where=column)
    if not table.num_blocks:
        return torch.zeros((), dtype=torch.float64, device=table.device)
    result = torch.empty((), dtype=torch.float64, device=table.device)
    with table.device_guard():
        table.launch(
            _sum_sq_kernel,
            table.num_blocks,
            g_ptrs,
            None if metric is None else table.column("w"),
            None if ema_scale is None else table.column("ema"),
            table.column("copy") if perturbed_only else None,
            table.rows,
            table.blocks,
            metric,
            ema_scale,
            table.partials,
            table.ticket,
            result,
            TYPES=table.types,
            CHUNK=table.chunk,
            FINISH_BLOCK=_FINISH_BLOCK,
            num_warps=NUM_WARPS,
        )
    return result
