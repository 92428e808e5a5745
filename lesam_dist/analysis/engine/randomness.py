"""Random vectors and choices that depend on a seed alone: the same for all processes, devices, methods and epochs."""

from __future__ import annotations

import torch
from torch import Tensor

from lesam_dist.train.randomness import generator, normal, some_of

__all__ = ["generator", "normal", "signs", "some_of"]


def signs(size: int, like: Tensor, seed: int, name: str, index: int = 0) -> Tensor:
    """-1 or 1 with equal chance (Rademacher), (size,), in the dtype and on the device of ``like``."""
    return torch.randint(2, (size,), generator=generator(seed, name, index)).mul_(2).sub_(1).to(like)
