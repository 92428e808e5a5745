"""What each batch of each epoch holds. The two backends decode what is planned here and decide nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.order import epoch_order, rank_batches
from lesam_dist.data.transform import Draws, Transform, draw
from lesam_dist.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One batch of one rank: files, int64 labels ``(B,)``, and its random numbers (None: evaluation)."""

    paths: list[str]
    labels: NDArray[np.int64]
    draws: Draws | None


@dataclass(frozen=True)
class Plan:
    """All batches of one rank, a pure function of ``(seed, epoch)``: order, crops and flips.

    Neither the number of processes nor what was read before has a part in it, so there is no position and no
    generator state to save; ``state_dict`` only holds what makes two plans the same.

    Attributes:
        batch_size: over all ranks for training, on this rank for evaluation (see ``rank_batches``).
    """

    folder: ImageFolder
    transform: Transform
    train: bool
    batch_size: int
    seed: int
    rank: int
    world_size: int

    @property
    def local_batch_size(self) -> int:
        """Images in a full batch of this rank."""
        return self.batch_size // self.world_size if self.train else self.batch_size

    def __len__(self) -> int:
        if self.train:
            return len(self.folder) // self.batch_size
        n, rank, world = len(self.folder), self.rank, self.world_size
        return -(-((rank + 1) * n // world - rank * n // world) // self.batch_size)

    def epoch(self, index: int) -> Iterator[Batch]:
        """The batches of epoch ``index`` (any, in any order); evaluation epochs are all the same."""
        paths, labels = self.folder.paths, self.folder.labels
        order = epoch_order(len(paths), seed=self.seed, epoch=index, shuffle=self.train)
        batches = rank_batches(
            order, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size, train=self.train
        )
        mine = slice(self.rank * self.local_batch_size, (self.rank + 1) * self.local_batch_size)
        for i, batch in enumerate(batches):
            draws = None
            if self.train:
                full = draw(self.transform, self.batch_size, seed=self.seed, epoch=index, batch=i)
                draws = full.rows(mine)
            yield Batch([paths[j] for j in batch], labels[batch], draws)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"samples": len(self.folder), "files": self._digest}
        if self.train:
            state |= {"seed": self.seed, "batch_size": self.batch_size}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that this plan continues the one that was saved.

        Raises:
            UserError: the files, the seed or the global batch size differ. World size and backend may.
        """
        names = {
            "samples": "the number of images",
            "files": "the image files",
            "seed": "the seed",
            "batch_size": "the global batch size",
        }
        for key, now in self.state_dict().items():
            if key in state and state[key] != now:
                raise UserError(
                    f"cannot continue this run exactly: {names[key]} was {state[key]} in the checkpoint and "
                    f"is {now} now (data in '{self.folder.root}'). Go back to the former, or start a new run."
                )

    @cached_property
    def _digest(self) -> str:
        """Of the file names below the root, in order: the dataset may move, but not change."""
        below = len(str(self.folder.root))
        digest = hashlib.blake2b(digest_size=8)
        for path in self.folder.paths:
            digest.update(os.fsencode(path[below:]) + b"\0")
        return digest.hexdigest()
