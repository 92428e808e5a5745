"""How a chunk is split into elements that are accessed 16 bytes at a time and the others."""
# ruff: noqa: N803 (constexpr arguments are upper case, as everywhere in Triton)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vectorised(addresses, count):
    """How many of ``count`` elements to access 16 bytes at a time: 0 where an address is not aligned.

    ``addresses`` are those of all tensors, or-ed. The result is a multiple of 16, and the compiler knows it:
    a mask with any other end would split the access into single elements.
    """
    aligned = (addresses % 16 == 0).to(tl.int32)
    return count // 16 * 16 * aligned


@triton.jit
def aligned_ptr(address, DTYPE: tl.constexpr):
    """The address as a pointer that promises 16-byte alignment: never to be used where `vectorised` gave 0.

    A new pointer each time: `tl.multiple_of` marks the value that it is given, so a pointer cast once and
    used with and without the promise would carry it everywhere.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
