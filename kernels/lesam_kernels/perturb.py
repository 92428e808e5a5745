"""Save the weights and climb along the gradient; where asked, save the gradient too."""
# ruff: noqa: N803, N806 (constexprs are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from lesam_kernels.alignment import is_aligned, pointer, vectorised
from lesam_kernels.arguments import check_argument, check_if_given
from lesam_kernels.direction import check_direction, load_direction
from lesam_kernels.launch_config import MAX_REGISTERS
from lesam_kernels.program import block_of_launch, group_of, load_address, locate
from lesam_kernels.restore import copy_chunk
from lesam_kernels.tensor_table import TensorTable


@triton.jit
def _load_radius(sum_sq_ptr, radius_ptr, group):
    """norm = sqrt(sum_sq), rho = min(|sigma|/(norm + eps), rho_max), sign(sigma)*rho/norm, and whether norm is finite.

    All in fp64. rho is 0 where norm is 0 or not finite.
    """
    norm = tl.sqrt(tl.load(sum_sq_ptr))
    sigma = tl.load(radius_ptr + 3 * group)
    rho_max = tl.load(radius_ptr + 3 * group + 1)
    eps = tl.load(radius_ptr + 3 * group + 2)
    finite = norm < float("inf")
    usable = finite & (norm > 0)
    safe_norm = tl.where(usable, norm, 1.0)
    rho = tl.abs(sigma) / (safe_norm + eps)
    # Not tl.minimum: it would turn a NaN sigma into rho_max.
    rho = tl.where(rho > rho_max, rho_max, rho)
    rho = tl.where(usable, rho, 0.0)
    return norm, rho, tl.where(sigma < 0, -rho, rho) / safe_norm, finite


@triton.jit
def _store_stats(stats_ptr, found_inf_ptr, norm, rho, finite, RAISE: tl.constexpr):
    """stats <- (norm, rho, non_finite), and found_inf <- non_finite; RAISE: found_inf only goes up."""
    tl.store(stats_ptr, norm)
    tl.store(stats_ptr + 1, rho)
    tl.store(stats_ptr + 2, tl.where(finite, 0.0, 1.0))
    if found_inf_ptr is not None:
        before = tl.load(found_inf_ptr) if RAISE else 0.0
        tl.store(found_inf_ptr, tl.where(finite, before, 1.0))


@triton.jit
def _perturb_span(
    addresses,
    start,
    first,
    last,
    scale,
    scalars,
    DTYPE: tl.constexpr,
    METRIC: tl.constexpr,
    EMA: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """copy <- w, kept <- g, w <- w + scale * T^2*v for elements [first, last) from ``start``."""
    w_address, g_address, ema_address, copy_address, kept_address = addresses
    p, q, ema_scale = scalars
    w_ptr = pointer(w_address, DTYPE, ALIGNED) + start
    g_ptr = pointer(g_address, DTYPE, G_ALIGNED) + start
    ema_ptr = pointer(ema_address, DTYPE, G_ALIGNED) + start
    copy_ptr = pointer(copy_address, DTYPE, ALIGNED) + start
    kept_ptr = pointer(kept_address, DTYPE, ALIGNED) + start
    # An integer, for the end of a mask: a multiple of 16 times it is known to be a multiple of 16.
    has_kept = (kept_address != 0).to(tl.int32)
    for o in range(first, last, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < last
        saved = tl.load(w_ptr + off, mask=mask)
        w = saved.to(tl.float32)
        g = tl.load(g_ptr + off, mask=mask)
        v = g.to(tl.float32)
        if EMA:
            v = tl.fma(tl.load(ema_ptr + off, mask=mask).to(tl.float32), -ema_scale, v)
        if METRIC:
            metric = tl.fma(tl.abs(w), p, q)
            v *= metric * metric
        tl.store(copy_ptr + off, saved, mask=mask)
        if KEEP:
            tl.store(kept_ptr + off, g, mask=off < last * has_kept)
        tl.store(w_ptr + off, tl.fma(v, scale, w).to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=["first_block"],
    do_not_specialize_on_alignment=["sum_sq_ptr", "radius_ptr", "metric_ptr", "ema_scale_ptr", "found_inf_ptr"],
)
def _perturb_kernel(
    w_ptrs,
    g_ptrs,
    ema_ptrs,
    copy_ptrs,
    kept_ptrs,
    rows_ptr,
    blocks_ptr,
    sum_sq_ptr,
    radius_ptr,
    metric_ptr,
    ema_scale_ptr,
    stats_ptr,
    found_inf_ptr,
    first_block,
    RAISE: tl.constexpr,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WALK_BACK: tl.constexpr,
):
    """copy <- w, kept <- g, w <- w + rho/norm * T^2*v; norm and rho as in `_load_radius`, v and T as in `direction`.

    Per element: reads w and g (and ema), writes copy and w (and kept); where rho is 0, reads w and writes copy (and
    reads g and writes kept). Copy and kept are exact. rho/norm is fp64 rounded to fp32, w one fp32 fma rounded to w's
    dtype.
    """
    block = block_of_launch(first_block, WALK_BACK)
    row, start, count = locate(rows_ptr, blocks_ptr, block, CHUNK)
    group = group_of(rows_ptr, row)
    norm, rho, scale, finite = _load_radius(sum_sq_ptr, radius_ptr, group)
    if block == 0:
        _store_stats(stats_ptr, found_inf_ptr, norm, rho, finite, RAISE)
    scalars = load_direction(metric_ptr, ema_scale_ptr, group)
    METRIC: tl.constexpr = metric_ptr is not None
    EMA: tl.constexpr = ema_scale_ptr is not None
    KEEP: tl.constexpr = kept_ptrs is not None
    w_address = tl.load(w_ptrs + row)
    g_address = tl.load(g_ptrs + row)
    ema_address = load_address(ema_ptrs, row)
    copy_address = tl.load(copy_ptrs + row)
    kept_address = load_address(kept_ptrs, row)
    addresses = w_address, g_address, ema_address, copy_address, kept_address
    perturbed = (g_address != 0) & (copy_address != 0)
    # Adding 0*g instead would not leave every w as it is: not where g is inf or NaN, nor where w is -0.
    if perturbed & (rho > 0):
        scale_32 = scale.to(tl.float32)
        vector_count = vectorised(w_address | copy_address | kept_address, count)
        # Gradients are often views at any offset (FSDP2): weights and copies stay vectorised next to them.
        all_count = vector_count * is_aligned(g_address | ema_address)
        _perturb_span(addresses, start, 0, all_count, scale_32, scalars, DTYPE, METRIC, EMA, KEEP, True, True, BLOCK)
        _perturb_span(
            addresses,
            start,
            all_count,
            vector_count,
            scale_32,
            scalars,
            DTYPE,
            METRIC,
            EMA,
            KEEP,
            True,
            False,
            BLOCK,
        )
        _perturb_span(
            addresses,
            start,
            vector_count,
            count,
            scale_32,
            scalars,
            DTYPE,
            METRIC,
            EMA,
            KEEP,
            False,
            False,
            BLOCK // 2,
        )
    else:
        copy_chunk(copy_address, w_address, start, tl.where(perturbed, count, 0), DTYPE, BLOCK)
        if KEEP:  # also of rows that are never perturbed
            kept = (g_address != 0) & (kept_address != 0)
            copy_chunk(kept_address, g_address, start, tl.where(kept, count, 0), DTYPE, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["sum_sq_ptr", "radius_ptr", "found_inf_ptr"])
def _stats_kernel(sum_sq_ptr, radius_ptr, stats_ptr, found_inf_ptr, RAISE: tl.constexpr):
    """The stats of `_perturb_kernel` alone, of group 0, for a rank that holds no element."""
    norm, rho, _, finite = _load_radius(sum_sq_ptr, radius_ptr, 0)
    _store_stats(stats_ptr, found_inf_ptr, norm, rho, finite, RAISE)


def perturb(
    table: TensorTable,
    sum_sq: Tensor,
    radius: Tensor,
    *,
    metric: Tensor | None = None,
    ema_scale: Tensor | None = None,
    keep: bool = False,
    found_inf: Tensor | None = None,
    raise_only: bool = False,
) -> Tensor:
    """Save the weights and climb: ``copy <- w``, ``w <- w + rho * T^2*v/norm``.

    ``v = g - ema_scale*ema`` and ``T = p*|w| + q`` are those of `sum_sq`, which see; without them the
    direction is ``g/norm``. With ``norm = sqrt(sum_sq)`` and ``rho = min(sigma/(norm + eps), rho_max)``, computed on
    the device in float64. A norm of zero or that is not finite makes rho 0. Where rho is 0 every ``w`` keeps its bits.
    ``copy`` is written in every case, so that `restore` is always right. A row without a tensor in column "g" or
    "copy" is left alone, its copy too.

    One launch per dtype, no host sync. The parameters' autograd version counters go up.

    Args:
        table: columns "g" and "copy" must be set.
        sum_sq: one float64 element: the squared norm of the whole direction, of which the table may hold a part.
        radius: float64 (G, 3): sigma, rho_max, eps of each param group. One of sigma and rho_max may be +inf: an
            infinite sigma gives the fixed radius rho_max. A negative sigma moves against the direction.
        metric, ema_scale: as `sum_sq` had them.
        keep: also ``g_kept <- g``, bit for bit, for every row that has a tensor in both columns, perturbed or not.
        found_inf: one float32 element that becomes 1.0 where the norm is not finite, else 0.0; None for none.
        raise_only: leave ``found_inf`` as it is where the norm is finite.

    Returns:
        New float64 tensor (3,): norm, rho, and 1.0 where the norm is not finite, else 0.0; rho is that of the param
        group of the table's first row, of group 0 for an empty table.

    Raises:
        ValueError: a column that is read is not set or lacks a tensor; an argument of another shape or device.
        TypeError: an argument of another dtype.
    """
    g_ptrs, copy_ptrs = table.column("g"), table.column("copy")
    check_argument("sum_sq", sum_sq, torch.float64, (), table.device)
    check_argument("radius", radius, torch.float64, (table.num_groups, 3), table.device)
    check_direction(table, metric, ema_scale)
    if ema_scale is not None:
        table.require("ema", where="g")
    check_if_given("found_inf", found_inf, torch.float32, (), table.device)
    kept_ptrs = table.column("g_kept") if keep else None
    # With all of them ptxas spills to get down to 40 registers, which the others need: see MAX_REGISTERS.
    limit = {"maxnreg": MAX_REGISTERS} if keep and metric is not None and ema_scale is not None else {}
    stats = torch.empty(3, dtype=torch.float64, device=table.device)
    with table.device_guard():
        for segment in table.segments:
            table.launch(
                _perturb_kernel,
                segment.num_blocks,
                table.column("w"),
                g_ptrs,
                None if ema_scale is None else table.column("ema"),
                copy_ptrs,
                kept_ptrs,
                table.rows,
                table.blocks,
                sum_sq,
                radius,
                metric,
                ema_scale,
                stats,
                found_inf,
                segment.first_block,
                RAISE=raise_only,
                **segment.constants,
                **limit,
            )
        if not table.segments:
            table.launch(_stats_kernel, 1, sum_sq, radius, stats, found_inf, RAISE=raise_only)
    increment_version(table.written)
    return stats
