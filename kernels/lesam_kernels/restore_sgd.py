"""Restore the exact weights and make torch.optim.SGD's update, in one launch."""
# ruff: noqa: N803, N806 (constexprs are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from lesam_kernels.alignment import is_aligned, pointer, vectorised
from lesam_kernels.arguments import check_argument
from lesam_kernels.program import block_of_launch, group_of, load_address, locate
from lesam_kernels.restore import copy_chunk, load_exact
from lesam_kernels.tensor_table import TensorTable
from lesam_kernels.update import check_update, is_allowed, tell_skipped, tell_without_rows, times


@triton.jit
def _load_scalars(scalars_ptr, a_factors_ptr, b_factors_ptr, group, buf_address):
    """The group's scalars, with what a row without a buffer makes of them."""
    ptr = scalars_ptr + 7 * group
    lr, momentum, dampening, weight_decay = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    nesterov, a, b = tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6)
    a, b = times(a, a_factors_ptr, group), times(b, b_factors_ptr, group)
    has_buf = buf_address != 0
    nesterov = has_buf & (nesterov != 0)
    # An integer, for ends of masks: a multiple of 16 times it is known to be a multiple of 16.
    return lr, momentum, 1.0 - dampening, weight_decay, nesterov, a, b, has_buf.to(tl.int32)


@triton.jit
def _sgd_span(
    addresses,
    start,
    first,
    last,
    scalars,
    DTYPE: tl.constexpr,
    KEPT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update of `_restore_sgd_kernel` for elements [first, last) from ``start``."""
    w_address, exact_address, buf_address, g_hat_address, g_kept_address = addresses
    lr, momentum, undamped, weight_decay, nesterov, a, b, has_buf = scalars
    w_ptr = pointer(w_address, DTYPE, ALIGNED) + start
    exact_ptr = pointer(exact_address, DTYPE, ALIGNED) + start
    buf_ptr = pointer(buf_address, DTYPE, ALIGNED) + start
    g_hat_ptr = pointer(g_hat_address, DTYPE, G_ALIGNED) + start
    g_kept_ptr = pointer(g_kept_address, DTYPE, G_ALIGNED) + start
    kept = (g_kept_address != 0).to(tl.int32)
    for o in range(first, last, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < last
        w = tl.load(exact_ptr + off, mask=mask).to(tl.float32)
        d = a * tl.load(g_hat_ptr + off, mask=mask).to(tl.float32)
        if KEPT:
            d = tl.fma(tl.load(g_kept_ptr + off, mask=off < last * kept, other=0.0).to(tl.float32), b, d)
        d = tl.fma(w, weight_decay, d)
        if MOMENTUM:
            buf = tl.load(buf_ptr + off, mask=off < last * has_buf, other=0.0).to(tl.float32)
            buf = tl.where(has_buf != 0, tl.fma(buf, momentum, undamped * d), d)
            tl.store(buf_ptr + off, buf.to(DTYPE), mask=off < last * has_buf)
            d = tl.where(nesterov, tl.fma(buf, momentum, d), buf)
        tl.store(w_ptr + off, tl.fma(d, -lr, w).to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=["first_block"],
    do_not_specialize_on_alignment=[
        "scalars_ptr",
        "a_factors_ptr",
        "b_factors_ptr",
        "found_inf_ptr",
        "sum_sq_ptr",
        "skipped_ptr",
    ],
)
def _restore_sgd_kernel(
    w_ptrs,
    copy_ptrs,
    g_ptrs,
    g_hat_ptrs,
    g_kept_ptrs,
    buf_ptrs,
    rows_ptr,
    blocks_ptr,
    scalars_ptr,
    a_factors_ptr,
    b_factors_ptr,
    found_inf_ptr,
    sum_sq_ptr,
    skipped_ptr,
    first_block,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WALK_BACK: tl.constexpr,
):
    """With w the copy where `perturb` moved the row:

        d = a*g_hat + b*g_kept + weight_decay*w
        buf <- momentum*buf + (1 - dampening)*d
        w <- w - lr * (nesterov ? d + momentum*buf : buf)

    Per element: reads copy, g_hat, buf and g_kept where there is one, writes w and buf. Without a buffer d takes its
    place. fp32, each line rounded as written with fused multiply-adds; what is stored is rounded
    to w's dtype. Without g_hat, or where found_inf is not 0 or sum_sq not finite: w <- copy alone, exact.
    """
    block = block_of_launch(first_block, WALK_BACK)
    row, start, count = locate(rows_ptr, blocks_ptr, block, CHUNK)
    w_address, exact_address, perturbed = load_exact(w_ptrs, copy_ptrs, g_ptrs, row)
    g_hat_address = tl.load(g_hat_ptrs + row)
    g_kept_address = load_address(g_kept_ptrs, row)
    buf_address = load_address(buf_ptrs, row)
    KEPT: tl.constexpr = g_kept_ptrs is not None
    MOMENTUM: tl.constexpr = buf_ptrs is not None
    scalars = _load_scalars(scalars_ptr, a_factors_ptr, b_factors_ptr, group_of(rows_ptr, row), buf_address)
    addresses = w_address, exact_address, buf_address, g_hat_address, g_kept_address
    allowed = is_allowed(found_inf_ptr, sum_sq_ptr)
    if block == 0:
        tell_skipped(allowed, found_inf_ptr, skipped_ptr)
    if (g_hat_address != 0) & allowed:
        vector_count = vectorised(w_address | exact_address | buf_address, count)
        # Gradients are often views at any offset (FSDP2): weights and state stay vectorised next to them.
        all_count = vector_count * is_aligned(g_hat_address | g_kept_address)
        _sgd_span(addresses, start, 0, all_count, scalars, DTYPE, KEPT, MOMENTUM, True, True, BLOCK)
        _sgd_span(addresses, start, all_count, vector_count, scalars, DTYPE, KEPT, MOMENTUM, True, False, BLOCK)
        _sgd_span(addresses, start, vector_count, count, scalars, DTYPE, KEPT, MOMENTUM, False, False, BLOCK // 2)
    else:
        copy_chunk(w_address, exact_address, start, tl.where(perturbed, count, 0), DTYPE, BLOCK)


def restore_sgd(
    table: TensorTable,
    scalars: Tensor,
    found_inf: Tensor,
    *,
    sum_sq: Tensor | None = None,
    a_factors: Tensor | None = None,
    b_factors: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """Restore the exact weights and step as torch.optim.SGD does with the gradient ``a*g_hat + b*g_kept``.

    Every row with a tensor in column "g_hat" is updated from its exact weights: the copy where `perturb` moved it
    (tensors in columns "copy" and "g"), else w. Rows that were perturbed and have no "g_hat" are restored. One launch
    per dtype, no host sync. The parameters' autograd version counters go up.

    Args:
        table: columns "copy", "g" and "g_hat" must be set. "momentum_buffer": no momentum for rows without one, or
            where it is not set. "g_kept": a missing one counts as zero; b is ignored where it is not set.
        scalars: float32 (G, 7), of each param group: lr, momentum, dampening, weight_decay, nesterov (0 or 1), a, b.
            To maximize, negate a and b. Buffers begin as zeros: torch's first step, but for dampening, which torch
            leaves out of it.
        found_inf: one float32 element; where it is not 0 rows are restored and nothing else is written.
        sum_sq: one float64 element, the sum of squares of the whole "g_hat": where it is not finite, found_inf becomes
            1.0, and the update is left out.
        a_factors, b_factors: float64 (G,), by which a and b are multiplied; None for ones.
        skipped: one float32 element, to which 1 is added where the update is left out.

    Raises:
        ValueError: a column that is read is not set; an argument of another shape or device.
        TypeError: an argument is not float32.
    """
    w_ptrs, copy_ptrs, g_ptrs, g_hat_ptrs = (table.column(name) for name in ("w", "copy", "g", "g_hat"))
    check_argument("scalars", scalars, torch.float32, (table.num_groups, 7), table.device)
    check_update(table, a_factors, b_factors, found_inf, sum_sq, skipped)
    with table.device_guard():
        for segment in table.segments:
            table.launch(
                _restore_sgd_kernel,
                segment.num_blocks,
                w_ptrs,
                copy_ptrs,
                g_ptrs,
                g_hat_ptrs,
                table.column_if_set("g_kept"),
                table.column_if_set("momentum_buffer"),
                table.rows,
                table.blocks,
                scalars,
                a_factors,
                b_factors,
                found_inf,
                sum_sq,
                skipped,
                segment.first_block,
                **segment.constants,
            )
        tell_without_rows(table, found_inf, sum_sq, skipped)
    increment_version(table.written)
