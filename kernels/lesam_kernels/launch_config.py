"""How a kernel is launched, as a host rule: never autotuned.

Autotuning runs every candidate on the real arguments, and a kernel that writes through a pointer table would
apply its update once per candidate.
"""

from __future__ import annotations

import torch
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SUPPORTED_DTYPES = tuple(TRITON_DTYPES)

CHUNK = 16384
"""Elements per program; one number for every dtype, so that one launch can cover a list of mixed dtypes."""

NUM_WARPS = 8

MAX_REGISTERS = 64
"""Per thread: then half of a multiprocessor's threads find room. A kernel near it is compiled with this limit, because
the assembler spills on its own to get below 48 (two thirds of the threads).
"""

_VECTOR_BYTES = 16


def block_of(dtype: torch.dtype) -> int:
    """Elements of one tensor that a program takes at a time: 16 bytes per thread."""
    return _VECTOR_BYTES // dtype.itemsize * 32 * NUM_WARPS


MAX_BLOCK = block_of(torch.bfloat16)
"""A chunk is a whole number of these, the largest block of a kernel that writes."""
