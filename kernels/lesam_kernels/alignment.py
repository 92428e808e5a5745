"""How a chunk is split into elements that are accessed 16 bytes at a time and the others."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_aligned(addresses):
    """1 where all of the addresses, which are given or-ed, are multiples of 16 bytes; else 0."""
    return (addresses % 16 == 0).to(tl.int32)


@triton.jit
def vectorised(addresses, count):
    """How many of ``count`` elements to access 16 bytes at a time: 0 where an address is not aligned.

    ``addresses`` are those of all tensors, or-ed. The result is a multiple of 16, and the compiler knows it:
    a mask with any other end would split the access into single elements.
    """
    return count // 16 * 16 * is_aligned(addresses)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer; ALIGNED promises 16 bytes, and is never to be used where `is_aligned` gave 0.

    A new pointer each time: `tl.multiple_of` marks the value that it is given, so a pointer cast once and
    used with and without the promise would carry it everywhere.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) if ALIGNED else address.to(tl.pointer_type(DTYPE))
