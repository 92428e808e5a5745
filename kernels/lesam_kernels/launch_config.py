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

_NUM_WARPS = 8
_VECTOR_BYTES = 16


class LaunchConfig(NamedTuple):
    """Elements per loop iteration of a program, and the warps that share them."""

    block: int
    num_warps: int


def launch_config(*dtypes: torch.dtype) -> LaunchConfig:
    """The launch for a kernel that touches one element of each of ``dtypes`` at a time.

    A thread gets 16 bytes of the widest dtype. With fp32 next to bf16 that is 4 elements: with 8, Triton
    would convert layouts through shared memory.
    """
    elements_per_thread = _VECTOR_BYTES // max(dtype.itemsize for dtype in dtypes)
    return LaunchConfig(elements_per_thread * 32 * _NUM_WARPS, _NUM_WARPS)


MAX_BLOCK = launch_config(torch.bfloat16).block
"""The largest block of any dtype: a chunk is a whole number of these."""
