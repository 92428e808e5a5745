"""Restore the exact weights and make torch.optim.AdamW's update, in one launch."""
# ruff: noqa: N803, N806 (constexprs are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from lesam_kernels.alignment import is_aligned, pointer, vectorised
from lesam_kernels.arguments import check_argument
from lesam_kernels.launch_config import MAX_REGISTERS
from lesam_kernels.program import block_of_launch, group_of, is_last, load_address, locate
from lesam_kernels.restore import copy_chunk, load_exact
from lesam_kernels.tensor_table import TensorTable
from lesam_kernels.update import check_update, is_allowed, tell_skipped, tell_without_rows, times

_STEPS_BLOCK = 256


@triton.jit
def _power(base, exponent):
    """base^exponent by repeated squaring in fp64: exact but for its roundings, and needs no library."""
    result = tl.full([], 1.0, tl.float64)
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def _load_scalars(scalars_ptr, a_factors_ptr, b_factors_ptr, group, step):
    """What update number ``step`` multiplies with: in fp64, then rounded to fp32."""
    ptr = scalars_ptr + 7 * group
    lr, beta1, beta2, eps = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    weight_decay, a, b = tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6)
    a, b = times(a, a_factors_ptr, group), times(b, b_factors_ptr, group)
    step_size = lr / (1.0 - _power(beta1, step))
    root_factor = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
    return (
        step_size.to(tl.float32),
        root_factor.to(tl.float32),
        eps.to(tl.float32),
        (1.0 - lr * weight_decay).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        a.to(tl.float32),
        b.to(tl.float32),
    )


@triton.jit
def _adamw_span(
    addresses,
    start,
    first,
    last,
    scalars,
    DTYPE: tl.constexpr,
    KEPT: tl.constexpr,
    ALIGNED: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update of `_restore_adamw_kernel` for elements [first, last) from ``start``."""
    w_address, exact_address, m_address, v_address, g_hat_address, g_kept_address = addresses
    step_size, root_factor, eps, decay, one_minus_beta1, beta2, one_minus_beta2, a, b = scalars
    w_ptr = pointer(w_address, DTYPE, ALIGNED) + start
    exact_ptr = pointer(exact_address, DTYPE, ALIGNED) + start
    m_ptr = pointer(m_address, DTYPE, ALIGNED) + start
    v_ptr = pointer(v_address, DTYPE, ALIGNED) + start
    g_hat_ptr = pointer(g_hat_address, DTYPE, G_ALIGNED) + start
    g_kept_ptr = pointer(g_kept_address, DTYPE, G_ALIGNED) + start
    kept = (g_kept_address != 0).to(tl.int32)
    for o in range(first, last, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < last
        w = tl.load(exact_ptr + off, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + off, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + off, mask=mask, other=0.0).to(tl.float32)
        d = a * tl.load(g_hat_ptr + off, mask=mask, other=0.0).to(tl.float32)
        if KEPT:
            d = tl.fma(tl.load(g_kept_ptr + off, mask=off < last * kept, other=0.0).to(tl.float32), b, d)
        m = tl.fma(d - m, one_minus_beta1, m)
        v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
        tl.store(m_ptr + off, m.to(DTYPE), mask=mask)
        tl.store(v_ptr + off, v.to(DTYPE), mask=mask)
        ratio = tl.div_rn(m, tl.fma(tl.sqrt_rn(v), root_factor, eps))
        tl.store(w_ptr + off, tl.fma(ratio, -step_size, decay * w).to(DTYPE), mask=mask)


@triton.jit
def _count_steps(g_hat_ptrs, step_ptrs, first_row, num_rows, BLOCK: tl.constexpr):
    """step <- step + 1 for the rows that have a g_hat."""
    for o in range(0, num_rows, BLOCK):
        row = o + tl.arange(0, BLOCK)
        mask = row < num_rows
        g_hat_address = tl.load(g_hat_ptrs + first_row + row, mask=mask, other=0)
        updated = mask & (g_hat_address != 0)
        step_ptr = tl.load(step_ptrs + first_row + row, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step_ptr, tl.load(step_ptr, mask=updated, other=0.0) + 1.0, mask=updated)


@triton.jit(
    do_not_specialize=["first_block", "first_row", "num_rows"],
    do_not_specialize_on_alignment=[
        "scalars_ptr",
        "a_factors_ptr",
        "b_factors_ptr",
        "found_inf_ptr",
        "sum_sq_ptr",
        "skipped_ptr",
    ],
)
def _restore_adamw_kernel(
    w_ptrs,
    copy_ptrs,
    g_ptrs,
    g_hat_ptrs,
    g_kept_ptrs,
    m_ptrs,
    v_ptrs,
    step_ptrs,
    rows_ptr,
    blocks_ptr,
    scalars_ptr,
    a_factors_ptr,
    b_factors_ptr,
    found_inf_ptr,
    sum_sq_ptr,
    skipped_ptr,
    ticket_ptr,
    first_block,
    first_row,
    num_rows,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WALK_BACK: tl.constexpr,
    STEPS_BLOCK: tl.constexpr,
):
    """With w the copy where `perturb` moved the row, and t the row's step + 1:

        d = a*g_hat + b*g_kept
        m <- m + (1 - beta1)*(d - m),  v <- beta2*v + (1 - beta2)*d^2
        w <- (1 - lr*weight_decay)*w - lr/(1 - beta1^t) * m / (sqrt(v)/sqrt(1 - beta2^t) + eps)

    Per element: reads copy, g_hat, m, v and g_kept where there is one, writes w, m and v. The last program stores t.
    fp32, scalars in fp64; what is stored is rounded to w's dtype, the last line uses m and v before that. Without
    g_hat, or where found_inf is not 0 or sum_sq not finite: w <- copy alone, exact.
    """
    block = block_of_launch(first_block, WALK_BACK)
    row, start, count = locate(rows_ptr, blocks_ptr, block, CHUNK)
    w_address, exact_address, perturbed = load_exact(w_ptrs, copy_ptrs, g_ptrs, row)
    m_address, v_address = tl.load(m_ptrs + row), tl.load(v_ptrs + row)
    g_hat_address = tl.load(g_hat_ptrs + row)
    g_kept_address = load_address(g_kept_ptrs, row)
    KEPT: tl.constexpr = g_kept_ptrs is not None
    addresses = w_address, exact_address, m_address, v_address, g_hat_address, g_kept_address
    allowed = is_allowed(found_inf_ptr, sum_sq_ptr)
    if block == 0:
        tell_skipped(allowed, found_inf_ptr, skipped_ptr)
    if (g_hat_address != 0) & allowed:
        step = tl.load(tl.load(step_ptrs + row).to(tl.pointer_type(tl.float32))).to(tl.int32) + 1
        scalars = _load_scalars(scalars_ptr, a_factors_ptr, b_factors_ptr, group_of(rows_ptr, row), step)
        vector_count = vectorised(w_address | exact_address | m_address | v_address, count)
        # Gradients are often views at any offset (FSDP2): weights and state stay vectorised next to them.
        all_count = vector_count * is_aligned(g_hat_address | g_kept_address)
        _adamw_span(addresses, start, 0, all_count, scalars, DTYPE, KEPT, True, True, BLOCK)
        _adamw_span(addresses, start, all_count, vector_count, scalars, DTYPE, KEPT, True, False, BLOCK)
        _adamw_span(addresses, start, vector_count, count, scalars, DTYPE, KEPT, False, False, BLOCK // 2)
    else:
        copy_chunk(w_address, exact_address, start, tl.where(perturbed, count, 0), DTYPE, BLOCK)
    if is_last(ticket_ptr):
        if allowed:
            _count_steps(g_hat_ptrs, step_ptrs, first_row, num_rows, STEPS_BLOCK)
        tl.store(ticket_ptr, 0)


def restore_adamw(
    table: TensorTable,
    scalars: Tensor,
    found_inf: Tensor,
    *,
    sum_sq: Tensor | None = None,
    a_factors: Tensor | None = None,
    b_factors: Tensor | None = None,
    skipped: Tensor | None = None,
) -> None:
    """Restore the exact weights and step as torch.optim.AdamW (no amsgrad) with the gradient ``a*g_hat + b*g_kept``.

    Every row with a tensor in column "g_hat" is updated from its exact weights: the copy where `perturb` moved it
    (tensors in columns "copy" and "g"), else w. Its update is number ``step + 1``, which is then stored as its step.
    Rows that were perturbed and have no "g_hat" are restored. One launch per dtype, no host sync. The
    parameters' autograd version counters go up.

    A parameter without elements has no row: its step is not counted.

    Args:
        table: columns "copy", "g" and "g_hat" must be set; "exp_avg", "exp_avg_sq" and "step" must have a tensor
            wherever "g_hat" has. No two rows share a step. "g_kept": a missing one counts as zero; b is ignored where
            it is not set.
        scalars: float64 (G, 7), of each param group: lr, beta1, beta2, eps, weight_decay, a, b. To maximize, negate
            a and b.
        found_inf: one float32 element; where it is not 0 rows are restored and nothing else is written.
        sum_sq: one float64 element, the sum of squares of the whole "g_hat": where it is not finite, found_inf becomes
            1.0, and the update is left out.
        a_factors, b_factors: float64 (G,), by which a and b are multiplied; None for ones.
        skipped: one float32 element, to which 1 is added where the update is left out.

    Raises:
        ValueError: a column that is read is not set or lacks a tensor; an argument of another shape or device.
        TypeError: ``scalars`` is not float64, ``found_inf`` not float32.
    """
    w_ptrs, copy_ptrs, g_ptrs, g_hat_ptrs = (table.column(name) for name in ("w", "copy", "g", "g_hat"))
    for name in ("exp_avg", "exp_avg_sq", "step"):
        table.require(name, where="g_hat")
    check_argument("scalars", scalars, torch.float64, (table.num_groups, 7), table.device)
    check_update(table, a_factors, b_factors, found_inf, sum_sq, skipped)
    with table.device_guard():
        for segment in table.segments:
            table.launch(
                _restore_adamw_kernel,
                segment.num_blocks,
                w_ptrs,
                copy_ptrs,
                g_ptrs,
                g_hat_ptrs,
                table.column_if_set("g_kept"),
                table.column("exp_avg"),
                table.column("exp_avg_sq"),
                table.column("step"),
                table.rows,
                table.blocks,
                scalars,
                a_factors,
                b_factors,
                found_inf,
                sum_sq,
                skipped,
                table.ticket,
                segment.first_block,
                segment.first_row,
                segment.num_rows,
                STEPS_BLOCK=_STEPS_BLOCK,
                maxnreg=MAX_REGISTERS,
                **segment.constants,
            )
        tell_without_rows(table, found_inf, sum_sq, skipped)
    increment_version(table.written)
