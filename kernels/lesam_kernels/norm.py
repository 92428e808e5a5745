"""Sum of squares of a list of tensors: the squared global gradient norm."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesam_kernels.alignment import aligned_ptr, vectorised
from lesam_kernels.launch_config import SUPPORTED_DTYPES, launch_config
from lesam_kernels.tensor_table import TensorTable

_FP32 = tl.constexpr(SUPPORTED_DTYPES.index(torch.float32))
_BF16 = tl.constexpr(SUPPORTED_DTYPES.index(torch.bfloat16))
_FINISH_BLOCK = 1024


@triton.jit
def _sum_sq_chunk(g_address, start, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of g^2 over ``count`` elements from ``start``, in fp32."""
    vector_count = vectorised(g_address, count)
    acc = tl.zeros([BLOCK], tl.float32)
    g_ptr = aligned_ptr(g_address, DTYPE) + start
    for o in range(0, vector_count, BLOCK):
        off = o + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + off, mask=off < vector_count, other=0.0).to(tl.float32)
        acc = tl.fma(g, g, acc)

    # Element i goes to lane i % BLOCK here as well, so that the bits do not depend on the alignment.
    g_ptr = g_address.to(tl.pointer_type(DTYPE)) + start
    for o in range(vector_count // BLOCK * BLOCK, count, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = (off >= vector_count) & (off < count)
        g = tl.load(g_ptr + off, mask=mask, other=0.0).to(tl.float32)
        acc = tl.fma(g, g, acc)
    return tl.sum(acc)


@triton.jit
def _sum_sq_kernel(
    g_ptrs,
    numels,
    dtype_codes,
    block_tensor,
    block_chunk,
    partials_ptr,
    CHUNK: tl.constexpr,
    BLOCK_32: tl.constexpr,
    BLOCK_16: tl.constexpr,
):
    """partials[block] = sum of g^2 over the block's chunk.

    Per element: reads g. Squares and sums in fp32 in a fixed order; only the rounding of sums is inexact.
    """
    block = tl.program_id(0)
    row = tl.load(block_tensor + block)
    start = tl.load(block_chunk + block).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(numels + row) - start, CHUNK).to(tl.int32)
    g_address = tl.load(g_ptrs + row)
    code = tl.load(dtype_codes + row)
    if code == _FP32:
        partial = _sum_sq_chunk(g_address, start, count, tl.float32, BLOCK_32)
    elif code == _BF16:
        partial = _sum_sq_chunk(g_address, start, count, tl.bfloat16, BLOCK_16)
    else:
        partial = _sum_sq_chunk(g_address, start, count, tl.float16, BLOCK_16)
    tl.store(partials_ptr + block, partial)


@triton.jit(do_not_specialize=["num_blocks"])
def _finish_sum_sq_kernel(partials_ptr, sum_sq_ptr, num_blocks, BLOCK: tl.constexpr):
    """sum_sq = sum of partials, in fp64 and in a fixed order: one program. Reads each partial once."""
    offsets = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float64)
    for o in range(0, num_blocks, BLOCK):
        off = o + offsets
        acc += tl.load(partials_ptr + off, mask=off < num_blocks, other=0.0).to(tl.float64)
    tl.store(sum_sq_ptr, tl.sum(acc))


def sum_sq(table: TensorTable) -> Tensor:
    """Sum of squares over all elements of the table's one list; of a gradient, its squared norm.

    Accumulated in float32 per chunk and in float64 beyond, in an order that depends on the list alone: equal
    lists give equal bits. Two launches whatever the dtypes, no host sync.

    Args:
        table: one list.

    Returns:
        New 0-d float64 tensor on the table's device, 0.0 for an empty list. Not finite where any element is
        not, or where a chunk's sum overflows float32 (elements of about 1e19).

    Raises:
        ValueError: the table does not hold one list.
    """
    if table.num_lists != 1:
        raise ValueError(f"the table holds {table.num_lists} lists; sum_sq takes one (the gradients).")
    result = torch.empty((), dtype=torch.float64, device=table.device)
    partials = torch.empty(table.num_blocks, dtype=torch.float32, device=table.device)
    config = launch_config(torch.float32)
    with table.device_guard():
        if table.num_blocks:
            _sum_sq_kernel[(table.num_blocks,)](
                table.addresses,
                table.numels,
                table.dtype_codes,
                table.block_tensor,
                table.block_chunk,
                partials,
                CHUNK=table.chunk,
                BLOCK_32=config.block,
                BLOCK_16=launch_config(torch.bfloat16).block,
                num_warps=config.num_warps,
            )
        _finish_sum_sq_kernel[(1,)](partials, result, table.num_blocks, BLOCK=_FINISH_BLOCK)
    table.release()
    return result
