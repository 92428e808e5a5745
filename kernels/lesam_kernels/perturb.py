"""Save the weights and climb along the gradient."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from lesam_kernels.alignment import aligned_ptr, vectorised
from lesam_kernels.launch_config import TRITON_DTYPES, launch_config
from lesam_kernels.restore import check_copy_dtype, copy_chunk
from lesam_kernels.tensor_table import TensorTable


@triton.jit
def _load_radius(sum_sq_ptr, radius_ptr):
    """norm = sqrt(sum_sq), rho = min(sigma/(norm + eps), rho_max), rho/norm, and whether norm is finite.

    All in fp64. rho is 0 where norm is 0 or not finite.
    """
    norm = tl.sqrt(tl.load(sum_sq_ptr))
    sigma = tl.load(radius_ptr)
    rho_max = tl.load(radius_ptr + 1)
    eps = tl.load(radius_ptr + 2)
    finite = norm < float("inf")
    usable = finite & (norm > 0)
    safe_norm = tl.where(usable, norm, 1.0)
    rho = sigma / (safe_norm + eps)
    # Not tl.minimum: it would turn a NaN sigma into rho_max.
    rho = tl.where(rho > rho_max, rho_max, rho)
    rho = tl.where(usable, rho, 0.0)
    return norm, rho, rho / safe_norm, finite


@triton.jit
def _store_stats(stats_ptr, norm, rho, finite):
    tl.store(stats_ptr, norm)
    tl.store(stats_ptr + 1, rho)
    tl.store(stats_ptr + 2, tl.where(finite, 0.0, 1.0))


@triton.jit
def _perturb_chunk(
    w_address,
    g_address,
    copy_address,
    start,
    count,
    scale,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """copy <- w, w <- w + scale*g over ``count`` elements from ``start``."""
    vector_count = vectorised(w_address | g_address | copy_address, count)
    w_ptr = aligned_ptr(w_address, W_DTYPE) + start
    g_ptr = aligned_ptr(g_address, G_DTYPE) + start
    copy_ptr = aligned_ptr(copy_address, W_DTYPE) + start
    for o in range(0, vector_count, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < vector_count
        w = tl.load(w_ptr + off, mask=mask)
        g = tl.load(g_ptr + off, mask=mask)
        tl.store(copy_ptr + off, w, mask=mask)
        tl.store(w_ptr + off, tl.fma(g.to(tl.float32), scale, w.to(tl.float32)).to(W_DTYPE), mask=mask)

    w_ptr = w_address.to(tl.pointer_type(W_DTYPE)) + start
    g_ptr = g_address.to(tl.pointer_type(G_DTYPE)) + start
    copy_ptr = copy_address.to(tl.pointer_type(W_DTYPE)) + start
    for o in range(vector_count, count, BLOCK // 2):
        off = o + tl.arange(0, BLOCK // 2)
        mask = off < count
        w = tl.load(w_ptr + off, mask=mask)
        g = tl.load(g_ptr + off, mask=mask)
        tl.store(copy_ptr + off, w, mask=mask)
        tl.store(w_ptr + off, tl.fma(g.to(tl.float32), scale, w.to(tl.float32)).to(W_DTYPE), mask=mask)


@triton.jit(do_not_specialize=["first_block"], do_not_specialize_on_alignment=["sum_sq_ptr", "radius_ptr"])
def _perturb_kernel(
    w_g_copy_ptrs,
    numels,
    block_tensor,
    block_chunk,
    sum_sq_ptr,
    radius_ptr,
    stats_ptr,
    first_block,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """copy <- w, w <- w + rho * g/norm, with norm and rho as in `_load_radius`.

    Per element: reads w and g, writes copy and w; where rho is 0, reads w and writes copy only.
    The copy is exact. rho/norm is fp64 rounded to fp32, w one fp32 fma rounded to w's dtype.
    """
    norm, rho, scale, finite = _load_radius(sum_sq_ptr, radius_ptr)
    if tl.program_id(0) == 0:
        _store_stats(stats_ptr, norm, rho, finite)
    block = first_block + tl.program_id(0)
    row = tl.load(block_tensor + block)
    start = tl.load(block_chunk + block).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(numels + row) - start, CHUNK).to(tl.int32)
    w_address = tl.load(w_g_copy_ptrs + 3 * row)
    g_address = tl.load(w_g_copy_ptrs + 3 * row + 1)
    copy_address = tl.load(w_g_copy_ptrs + 3 * row + 2)
    # Adding 0*g instead would not leave every w as it is: not where g is inf or NaN, nor where w is -0.
    if rho > 0:
        _perturb_chunk(
            w_address,
            g_address,
            copy_address,
            start,
            count,
            scale.to(tl.float32),
            W_DTYPE,
            G_DTYPE,
            BLOCK,
        )
    else:
        copy_chunk(copy_address, w_address, start, count, W_DTYPE, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["sum_sq_ptr", "radius_ptr"])
def _stats_kernel(sum_sq_ptr, radius_ptr, stats_ptr):
    """The stats of `_perturb_kernel` alone, for a rank that holds no element."""
    norm, rho, _, finite = _load_radius(sum_sq_ptr, radius_ptr)
    _store_stats(stats_ptr, norm, rho, finite)


def perturb(table: TensorTable, sum_sq: Tensor, radius: Tensor) -> Tensor:
    """Save the weights and climb: ``copy <- w``, ``w <- w + rho * g/norm``.

    With ``norm = sqrt(sum_sq)`` and ``rho = min(sigma/(norm + eps), rho_max)``, computed on the device in
    float64. A norm of zero or that is not finite makes rho 0. Where rho is 0 every ``w`` keeps its bits.
    ``copy`` is written in every case, so that `restore` is always right.

    One launch per pair of dtypes of w and g, no host sync. The parameters' autograd version counters go up.

    Args:
        table: three lists: parameters w, gradients g, copies; a copy has its parameter's dtype.
        sum_sq: one float64 element: the squared norm of the whole gradient, of which the table may hold a
            part.
        radius: float64 (3,): sigma, rho_max, eps. One of sigma and rho_max may be +inf: an infinite sigma
            gives the fixed radius rho_max.

    Returns:
        New float64 tensor (3,): norm, rho, and 1.0 where the norm is not finite, else 0.0.

    Raises:
        ValueError: the table does not hold three lists; ``sum_sq`` or ``radius`` has another size or device.
        TypeError: a copy's dtype is not its parameter's; ``sum_sq`` or ``radius`` is not float64.
    """
    if table.num_lists != 3:
        raise ValueError(f"the table holds {table.num_lists} lists; perturb takes three (w, g, copies).")
    for group in table.groups:
        check_copy_dtype(group.dtypes[0], group.dtypes[2])
    _check_argument("sum_sq", sum_sq, 1, table.device)
    _check_argument("radius", radius, 3, table.device)
    stats = torch.empty(3, dtype=torch.float64, device=table.device)
    with table.device_guard():
        for group in table.groups:
            config = launch_config(*group.dtypes)
            _perturb_kernel[(group.num_blocks,)](
                table.addresses,
                table.numels,
                table.block_tensor,
                table.block_chunk,
                sum_sq,
                radius,
                stats,
                group.first_block,
                W_DTYPE=TRITON_DTYPES[group.dtypes[0]],
                G_DTYPE=TRITON_DTYPES[group.dtypes[1]],
                CHUNK=table.chunk,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )
        if not table.groups:
            _stats_kernel[(1,)](sum_sq, radius, stats)
    table.release()
    increment_version(table.written)
    return stats


def _check_argument(name: str, value: Tensor, numel: int, device: torch.device) -> None:
    if value.dtype != torch.float64:
        raise TypeError(f"{name} is {value.dtype}; it must be float64.")
    if value.numel() != numel or value.device != device or not value.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and is on '{value.device}'; it must hold {numel} "
            f"contiguous element(s) on '{device}'."
        )
