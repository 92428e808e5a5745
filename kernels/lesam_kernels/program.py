"""What the programs of all kernels share: which elements are theirs, and which of them finishes last."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import triton
import triton.language as tl

ROW_FIELDS = tl.constexpr(3)  # of TensorTable.rows: numel, group, segment
BLOCK_FIELDS = tl.constexpr(2)  # of TensorTable.blocks: row, chunk


@triton.jit
def locate(rows_ptr, blocks_ptr, block, CHUNK: tl.constexpr):
    """The row of a block, the first of its elements (int64) and their number (int32)."""
    row = tl.load(blocks_ptr + BLOCK_FIELDS * block)
    start = tl.load(blocks_ptr + BLOCK_FIELDS * block + 1).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(rows_ptr + ROW_FIELDS * row) - start, CHUNK).to(tl.int32)
    return row, start, count


@triton.jit
def group_of(rows_ptr, row):
    """The param group of a row: which row of the scalar tensors holds its settings."""
    return tl.load(rows_ptr + ROW_FIELDS * row + 1)


@triton.jit
def segment_of(rows_ptr, row):
    """Position of the row's pair of dtypes in `TensorTable.segments`."""
    return tl.load(rows_ptr + ROW_FIELDS * row + 2)


@triton.jit
def load_address(ptrs, row):
    """The row's address in a column; 0 for a column that is None."""
    return tl.full([], 0, tl.int64) if ptrs is None else tl.load(ptrs + row)


@triton.jit
def block_of_launch(first_block, WALK_BACK: tl.constexpr):
    """The block of this program in a launch over a segment.

    From the end where WALK_BACK: `sum_sq` has just left the last gradients in the L2 cache.
    """
    program = tl.program_id(0)
    return first_block + (tl.num_programs(0) - 1 - program if WALK_BACK else program)


@triton.jit
def is_last(ticket_ptr):
    """Whether all other programs of the launch have called this. The last one must set the ticket back to 0.

    It sees what the others wrote before, and what they read before is not changed by what it writes after.
    """
    tl.debug_barrier()  # all threads of this program are done, not only the one that takes the ticket
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
