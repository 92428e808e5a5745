"""Give weights their saved values back."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from lesam_kernels.alignment import aligned_ptr, vectorised
from lesam_kernels.launch_config import TRITON_DTYPES, launch_config
from lesam_kernels.tensor_table import TensorTable


@triton.jit
def copy_chunk(to_address, from_address, start, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy ``count`` elements from ``start`` without converting them: the bits stay."""
    vector_count = vectorised(to_address | from_address, count)
    to_ptr = aligned_ptr(to_address, DTYPE) + start
    from_ptr = aligned_ptr(from_address, DTYPE) + start
    for o in range(0, vector_count, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < vector_count
        tl.store(to_ptr + off, tl.load(from_ptr + off, mask=mask), mask=mask)

    to_ptr = to_address.to(tl.pointer_type(DTYPE)) + start
    from_ptr = from_address.to(tl.pointer_type(DTYPE)) + start
    for o in range(vector_count, count, BLOCK // 2):
        off = o + tl.arange(0, BLOCK // 2)
        mask = off < count
        tl.store(to_ptr + off, tl.load(from_ptr + off, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["first_block"])
def _restore_kernel(
    w_copy_ptrs,
    numels,
    block_tensor,
    block_chunk,
    first_block,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w <- copy.

    Per element: reads copy, writes w. Exact, bit for bit.
    """
    block = first_block + tl.program_id(0)
    row = tl.load(block_tensor + block)
    start = tl.load(block_chunk + block).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(numels + row) - start, CHUNK).to(tl.int32)
    w_address = tl.load(w_copy_ptrs + 2 * row)
    copy_address = tl.load(w_copy_ptrs + 2 * row + 1)
    copy_chunk(w_address, copy_address, start, count, DTYPE, BLOCK)


def restore(table: TensorTable) -> None:
    """Write the copies back into the parameters, bit for bit: ``w <- copy``.

    One launch per dtype, no host sync. The parameters' autograd version counters go up.

    Args:
        table: two lists, parameters and copies; a copy has its parameter's dtype.

    Raises:
        ValueError: the table does not hold two lists.
        TypeError: a copy's dtype is not its parameter's.
    """
    if table.num_lists != 2:
        raise ValueError(f"the table holds {table.num_lists} lists; restore takes two (parameters, copies).")
    for group in table.groups:
        check_copy_dtype(*group.dtypes)
    with table.device_guard():
        for group in table.groups:
            dtype = group.dtypes[0]
            config = launch_config(dtype)
            _restore_kernel[(group.num_blocks,)](
                table.addresses,
                table.numels,
                table.block_tensor,
                table.block_chunk,
                group.first_block,
                DTYPE=TRITON_DTYPES[dtype],
                CHUNK=table.chunk,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )
    table.release()
    increment_version(table.written)


def check_copy_dtype(param: torch.dtype, copy: torch.dtype) -> None:
    """Raise TypeError where a copy could not hold its parameter's bits."""
    if copy != param:
        raise TypeError(f"a parameter is {param} but its copy {copy}; give the copy the parameter's dtype.")
