"""Random images, to try a run without data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lesam_dist.data.order import SYNTHETIC_STREAM


class SyntheticLoader:
    """A ``Loader`` of standard normal images and uniform labels, made on the device.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        image_size: side of the square images, in pixels.
        batch_size: images per batch on this rank.
        batches: per epoch.
        seed: a batch is a function of (seed, epoch, batch, rank); they differ between kinds of device.
        rank: of this process.
        device: where the batches are made.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        batch_size: int,
        batches: int,
        seed: int,
        rank: int,
        device: torch.device,
    ) -> None:
        self.num_classes = num_classes
        self.shape = (batch_size, 3, image_size, image_size)
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.device = device

    def __len__(self) -> int:
        return self.batches

    def epoch(self, index: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)``: float32 ``(B, 3, S, S)`` and int64 ``(B,)``, new tensors each time."""
        if start < 0:
            raise ValueError(f"start is {start}: it is a number of batches, at least 0")
        for batch in range(start, self.batches):
            key = np.random.SeedSequence(self.seed, spawn_key=(SYNTHETIC_STREAM, index, batch, self.rank))
            # All bits of it are mixed: torch's generator on the CPU reads the lower 32.
            generator = torch.Generator(self.device).manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
            images = torch.randn(self.shape, generator=generator, device=self.device)
            labels = torch.randint(
                self.num_classes, self.shape[:1], generator=generator, device=self.device, dtype=torch.int64
            )
            yield images, labels

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass
