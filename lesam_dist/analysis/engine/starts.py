"""Where the attacks of an analysis begin."""

from __future__ import annotations

import torch
from torch import Tensor

from lesam_dist.analysis.engine.randomness import generator
from lesam_dist.tasks.classification.pgd import Norm


def random_starts(norm: Norm, images: Tensor, seed: int, first: int) -> Tensor:
    """A random point of the unit box or ball for each image, in the shape of ``images``.

    Uniform in the box; in the ball a random direction, with a length that is uniform from 0 to 1. Each is a function
    of ``seed``, the norm and the image's index alone.

    Args:
        norm: of the box or the ball.
        images: (B, ...), for shape, dtype and device.
        seed: of all.
        first: index of the first of the images.
    """
    return torch.stack([_start(norm, images.shape[1:], seed, first + i) for i in range(len(images))]).to(images)


def _start(norm: Norm, shape: torch.Size, seed: int, index: int) -> Tensor:
    random = generator(seed, f"start in {norm}", index)
    if norm == "linf":
        return 2 * torch.rand(shape, generator=random) - 1
    direction = torch.randn(shape, generator=random)
    length: Tensor = torch.linalg.vector_norm(direction)
    return direction / length * torch.rand((), generator=random)
