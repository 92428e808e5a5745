"""How the images of a batch lie in memory."""

from __future__ import annotations

import torch

from lesam_dist.parallel.batch import Batch, transform


def in_format(batch: Batch, memory_format: torch.memory_format) -> Batch:
    """A batch whose (B, C, H, W) tensors lie in that format; the others as they are."""
    return transform(batch, lambda tensor: tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor)
