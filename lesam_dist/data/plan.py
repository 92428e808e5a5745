"""What each batch of each epoch holds. The two backends decode what is planned here and decide nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.sampling import Sampling
from lesam_dist.data.transform import Draws, Transform, draw


@dataclass(frozen=True)
class Batch:
    """One batch of one rank: files, int64 labels ``(B,)``, and its random numbers (None: evaluation)."""

    paths: list[str]
    labels: NDArray[np.int64]
    draws: Draws | None


@dataclass(frozen=True)
class Plan(Sampling):
    """All batches of one rank as files, with crops and flips: like the order a pure function of ``(seed, epoch)``."""

    folder: ImageFolder
    transform: Transform

    def epoch(self, index: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``index`` (any, in any order) from ``start`` on; evaluation epochs are all the same."""
        paths, labels = self.folder.paths, self.folder.labels
        for i, batch in enumerate(self.batches(index, start), start):
            draws = None
            if self.train:
                draws = draw(self.transform, self.positions(i), seed=self.seed, epoch=index)
            yield Batch([paths[j] for j in batch], labels[batch], draws)
