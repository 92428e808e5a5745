"""Random images, to try a run without data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class SyntheticLoader:
    """A ``Loader`` of standard normal images and uniform labels, made on the device.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        image_size: side of the square images, in pixels.
        batch_size: images per batch on this rank.
        batches: per epoch.
        seed: batches are a function of (seed, epoch, rank); they differ between kinds of device.
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

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)``: float32 ``(B, 3, S, S)`` and int64 ``(B,)``, new tensors each time."""
        # A hash of three small integers: neighbouring (seed, epoch, rank) must not share a stream.
        mixed = (self.seed * 1_000_003 + index) * 1_000_003 + self.rank
        generator = torch.Generator(self.device).manual_seed(mixed % 2**63)
        for _ in range(self.batches):
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
