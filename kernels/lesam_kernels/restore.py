"""Give weights their saved values back."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import triton
import triton.language as tl
from torch.autograd.graph import increment_version

from lesam_kernels.alignment import pointer, vectorised
from lesam_kernels.program import block_of_launch, locate
from lesam_kernels.tensor_table import TensorTable


@triton.jit
def _copy_span(
    to_address,
    from_address,
    start,
    first,
    last,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    to_ptr = pointer(to_address, DTYPE, ALIGNED) + start
    from_ptr = pointer(from_address, DTYPE, ALIGNED) + start
    for o in range(first, last, BLOCK):
        off = o + tl.arange(0, BLOCK)
        mask = off < last
        tl.store(to_ptr + off, tl.load(from_ptr + off, mask=mask), mask=mask)


@triton.jit
def copy_chunk(to_address, from_address, start, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy ``count`` elements from ``start`` without converting them: the bits stay."""
    vector_count = vectorised(to_address | from_address, count)
    _copy_span(to_address, from_address, start, 0, vector_count, DTYPE, True, BLOCK)
    _copy_span(to_address, from_address, start, vector_count, count, DTYPE, False, BLOCK // 2)


@triton.jit
def load_exact(w_ptrs, copy_ptrs, g_ptrs, row):
    """Addresses of w and of the exact weights, and whether `perturb` moved them to the copy.

    It did where there are a copy and a first gradient: what that one's address holds by now does not matter.
    """
    w_address = tl.load(w_ptrs + row)
    copy_address = tl.load(copy_ptrs + row)
    perturbed = (copy_address != 0) & (tl.load(g_ptrs + row) != 0)
    return w_address, tl.where(perturbed, copy_address, w_address), perturbed


@triton.jit(do_not_specialize=["first_block"])
def _restore_kernel(
    w_ptrs,
    copy_ptrs,
    g_ptrs,
    rows_ptr,
    blocks_ptr,
    first_block,
    DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WALK_BACK: tl.constexpr,
):
    """w <- copy.

    Per element: reads copy, writes w. Exact, bit for bit.
    """
    row, start, count = locate(rows_ptr, blocks_ptr, block_of_launch(first_block, WALK_BACK), CHUNK)
    w_address, exact_address, perturbed = load_exact(w_ptrs, copy_ptrs, g_ptrs, row)
    copy_chunk(w_address, exact_address, start, tl.where(perturbed, count, 0), DTYPE, BLOCK)


def restore(table: TensorTable) -> None:
    """Write the copies back into the parameters that `perturb` moved, bit for bit: ``w <- copy``.

    These are the rows with a tensor in both columns "copy" and "g". One launch per dtype, no host sync. The
    parameters' autograd version counters go up.

    Args:
        table: columns "copy" and "g" must be set, as they were for `perturb`.

    Raises:
        ValueError: one of them is not.
    """
    copy_ptrs, g_ptrs = table.column("copy"), table.column("g")
    with table.device_guard():
        for segment in table.segments:
            table.launch(
                _restore_kernel,
                segment.num_blocks,
                table.column("w"),
                copy_ptrs,
                g_ptrs,
                table.rows,
                table.blocks,
                segment.first_block,
                **segment.constants,
            )
    increment_version(table.written)
