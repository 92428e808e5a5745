"""How a kernel is launched, as a host rule: never autotuned.

Autotuning runs every candidate on the real arguments, and a kernel that writes through a pointer table would
apply its update once per candidate.
"""

from __future__ import annotations

from typing import NamedTuple

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


class LaunchConfig(NamedTuple):
    """Elements per loop iteration of a program, and the warps that share them."""

    block: int
    num_warps: int


def launch_config(*dtypes: torch.dtype, vectors: int = 1) -> LaunchConfig:
    """The launch for a kernel that touches one element of each of ``dtypes`` at a time.

    A thread gets 16 bytes of the widest dtype, ``vectors`` times: a kernel that only reads needs more loads under way
    to cover the memory's latency. With fp32 next to bf16 that is 4 elements: with 8,
    Triton would convert layouts through shared memory.
    """
    elements_per_thread = vectors * _VECTOR_BYTES // max(dtype.itemsize for dtype in dtypes)
    return LaunchConfig(elements_per_thread * 32 * NUM_WARPS, NUM_WARPS)


MAX_BLOCK = launch_config(torch.bfloat16).block
"""A chunk is a whole number of these, the largest block of a kernel that writes."""
