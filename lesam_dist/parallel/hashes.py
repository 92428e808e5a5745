"""Hashes of tensors, made where they lie: equal bits give equal hashes everywhere, and one flipped bit never does.

    H = sum_i m_i * x_i  mod 2^64          x_i: the bits of a tensor as 32-bit integers; m_i: odd, random, known

An integer that changes by d changes H by m_i * d, which is not 0 mod 2^64: m_i has an inverse, and 0 < |d| < 2^32. So
no flip of one bit, and no other damage within four bytes, goes unseen. Two values that change places change H by
(m_i - m_j) * d, and damage in several places by another such sum, which is 0 by a chance of 2^-32 at most: the m_i are
random, and d holds at most 31 of the 64 factors 2. (As 64-bit integers two flipped sign bits would cancel out.)

Sums of integers mod 2^64 are exact in any order, so no thread count, device or library changes a hash. What lies beyond
a chunk of `CHUNK` integers, and the last bytes that fill none, are hashes of their own, taken in one after the other:
H <- K * H + H(next) with an odd K, which keeps all of the above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lesam_dist.parallel.shards import local_shard

CHUNK = 2**18
"""Integers that are hashed at once. Their multipliers take 2 MiB on a device, and the products as much meanwhile."""

_K = 0x5851F42D4C957F2D  # odd
_SMALLER = {1: torch.uint8, 2: torch.int16}  # by their size
_SIZE = 4  # bytes of an integer


class Hasher:
    """Hashes tensors of any dtype on any device; each process makes the same hash of the same bits.

    Two launches for a tensor that fits a chunk (1 MiB), four for each further chunk and for bytes that fill no integer.
    Of B bytes it moves 7 B: it reads them and the multipliers, and writes and reads the products. A tensor whose memory
    is not contiguous, or does not begin at a multiple of four bytes, is copied first.
    """

    def __init__(self) -> None:
        self._tables: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def each(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """The hash of what this process holds of each tensor: int64, (len(tensors),), on ``device``; nothing waits."""
        buffers: dict[torch.device, Tensor] = {}
        hashes = [self._hash(local_shard(tensor).detach(), buffers) for tensor in tensors]
        there = [value.to(device, non_blocking=True) for value in hashes]
        return torch.stack(there) if there else torch.zeros(0, dtype=torch.int64, device=device)

    @torch.no_grad()
    def of(self, hashes: Tensor) -> Tensor:
        """One hash, int64 0-d, of several: also two of them that change places change it."""
        return self._hash(hashes, {})

    def _hash(self, tensor: Tensor, buffers: dict[torch.device, Tensor]) -> Tensor:
        device = tensor.device
        if device not in self._tables:
            self._tables[device] = _multipliers().to(device)
        if device not in buffers:
            buffers[device] = torch.empty(CHUNK, dtype=torch.int64, device=device)
        total: Tensor | None = None
        for chunk in _chunks(tensor):
            count = chunk.numel()
            products = torch.mul(chunk, self._tables[device][:count], out=buffers[device][:count])
            own = products.sum()
            total = own if total is None else total * _K + own
        return torch.zeros((), dtype=torch.int64, device=device) if total is None else total


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The bits of a tensor as integers: chunks of 32-bit ones, then the elements that fill none."""
    flat = tensor.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    size = flat.element_size()
    if flat.storage_offset() * size % _SIZE:
        flat = flat.clone()
    whole = flat.numel() * size // _SIZE * _SIZE // size
    yield from flat[:whole].view(torch.int32).split(CHUNK) if whole else ()
    if whole < flat.numel():
        yield flat[whole:].view(_SMALLER[size])


def _multipliers() -> Tensor:
    """Odd random numbers of 64 bits, the same on every process of one version of torch."""
    generator = torch.Generator().manual_seed(0x1E5A)
    return torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=generator) | 1
