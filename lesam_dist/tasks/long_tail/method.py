"""What a way to learn from a long tail may change: the network, what a step draws, and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lesam_dist.config.schema import LongTailConfig
from lesam_dist.parallel.batch import Batch, samples_in
from lesam_dist.tasks.task import At


class Method(ABC):
    """One way.

    Args:
        config: its numbers.
        counts: training images of each class, (C,) int64, on the device of the batches.
        seed: of what it draws.
    """

    def __init__(self, config: LongTailConfig, counts: Tensor, seed: int) -> None:
        self.config, self.counts, self.seed = config, counts, seed

    def network(self, model: nn.Module, name: str, num_classes: int) -> nn.Module:
        """The network, made of the one that the config names, which ends in a linear layer of classes."""
        return model

    def draw(self, batch: Batch, at: At) -> Batch:
        """See `Task.draw`."""
        return batch

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, (B,); the step's is their mean."""

    def count(self, batch: Batch) -> int | Tensor:
        """See `Task.count`."""
        return samples_in(batch)
