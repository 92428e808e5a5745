"""Random vectors and choices that depend on a seed alone: the same for all processes, devices, methods and epochs."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def generator(seed: int, name: str, index: int = 0) -> torch.Generator:
    """A generator on the host, of the ``index``-th vector of this name."""
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode()), index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def normal(size: int, like: Tensor, seed: int, name: str, index: int = 0) -> Tensor:
    """Standard normal, (size,), in the dtype and on the device of ``like``."""
    return torch.randn(size, generator=generator(seed, name, index)).to(like)


def signs(size: int, like: Tensor, seed: int, name: str, index: int = 0) -> Tensor:
    """-1 or 1 with equal chance (Rademacher), (size,), in the dtype and on the device of ``like``."""
    return torch.randint(2, (size,), generator=generator(seed, name, index)).mul_(2).sub_(1).to(like)


def chosen(total: int, count: int | None, seed: int, *, train: bool = False) -> NDArray[np.int64]:
    """Which ``count`` of ``total`` images an analysis is of, rising; all for None, or where there are not so many."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng([seed, train]).permutation(total)[:count])
