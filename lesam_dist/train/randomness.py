"""Random choices that depend on a seed and a name alone: the same for all processes, devices, methods and epochs."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LPF_NOISE = "lpf of a batch"
"""The name of the noise on the weights with which the low-pass filtered loss of one batch is estimated."""


def generator(seed: int, name: str, index: int = 0) -> torch.Generator:
    """A generator on the host, of the ``index``-th vector of this name."""
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode()), index]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def normal(size: int, like: Tensor, seed: int, name: str, index: int = 0) -> Tensor:
    """Standard normal, (size,), in the dtype and on the device of ``like``."""
    return torch.randn(size, generator=generator(seed, name, index)).to(like)


def some_of(count: int, samples: int | None, seed: int, *, train: bool) -> NDArray[np.int64]:
    """Which of ``count`` images of a split an analysis takes, ascending; None takes all."""
    if samples is None or samples >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, train]).permutation(count)[:samples])
