"""Which samples each batch of a process holds, whatever the samples are stored as."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.order import epoch_order, rank_batches, repeated_order
from lesam_dist.data.urls import Url
from lesam_dist.errors import UserError


class Samples(Protocol):
    """The training or the evaluation part of a data set."""

    @property
    def root(self) -> Path | Url | str:
        """Where it came from, for messages."""
        ...

    @property
    def digest(self) -> str:
        """A text that differs for any other data, and stays the same where the data has only moved."""
        ...

    def __len__(self) -> int: ...


class Split(Samples, Protocol):
    """One of images: sample ``i`` has the label ``labels[i]``."""

    @property
    def root(self) -> Path | Url: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        ...

    @property
    def labels(self) -> NDArray[Any]:
        """Integers ``(N,)``."""
        ...


@dataclass(frozen=True)
class Sampling:
    """The samples of all batches of one rank, a pure function of ``(seed, epoch)``.

    A global batch depends neither on the number of processes nor on what was read before, so there is no position
    and no generator's state to save. ``state_dict`` holds what must be equal for two runs to read the same.

    Attributes:
        folder: the data.
        train: shuffle, and drop the last incomplete global batch.
        batch_size: over all ranks for training, on this rank for evaluation (see ``rank_batches``).
        seed: not negative, the same on all ranks.
        rank: of this process, below ``world_size``.
        world_size: number of processes.
        repeats: times that each sample of a training batch is in it, see `repeated_order`.

    Raises:
        UserError: the batch size cannot be used for this many images or processes, or the seed is negative.
    """

    folder: Samples
    train: bool
    batch_size: int
    seed: int
    rank: int
    world_size: int
    repeats: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        batch_size, world_size = self.batch_size, self.world_size
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must be at least 0.")
        if self.train and batch_size % world_size:
            raise UserError(
                f"the global batch size {batch_size} cannot be divided by {world_size} processes: "
                f"use a multiple of {world_size}, e.g. {-(-batch_size // world_size) * world_size}."
            )
        if self.train and batch_size % self.repeats:
            raise UserError(f"the global batch size {batch_size} cannot be divided by {self.repeats} repeats.")
        if self.train and len(self.folder) < batch_size:
            raise UserError(
                f"'{self.folder.root}' has {len(self.folder)} training images, fewer than one global batch of "
                f"{batch_size}: use a batch size of at most {len(self.folder)}, or more images."
            )

    @property
    def local_batch_size(self) -> int:
        """Images in a full batch of this rank."""
        return self.batch_size // self.world_size if self.train else self.batch_size

    def positions(self, batch: int) -> range:
        """Where this rank's part of global training batch ``batch`` lies in the epoch's order."""
        first = batch * self.batch_size + self.rank * self.local_batch_size
        return range(first, first + self.local_batch_size)

    def __len__(self) -> int:
        if self.train:
            return len(self.folder) // self.batch_size
        n, rank, world = len(self.folder), self.rank, self.world_size
        return -(-((rank + 1) * n // world - rank * n // world) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> list[NDArray[np.int64]]:
        """The samples of each batch of any epoch, from batch ``start`` on; evaluation epochs are all the same.

        Raises:
            ValueError: ``start`` is negative.
        """
        if start < 0:
            raise ValueError(f"start is {start}: it is a number of batches, at least 0")
        order = self.order(epoch)
        if self.train and self.repeats > 1:
            order = repeated_order(order, self.batch_size, self.repeats)
        return rank_batches(
            order, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size, train=self.train
        )[start:]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The order in which any epoch reads the samples, the same on every rank."""
        return epoch_order(len(self.folder), seed=self.seed, epoch=epoch, shuffle=self.train)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"samples": len(self.folder), "files": self.folder.digest}
        if self.train:
            state |= {"seed": self.seed, "batch_size": self.batch_size, "repeats": self.repeats}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that these batches continue those that were saved.

        Raises:
            UserError: the files, the seed, the global batch size or the repeats differ. World size and backend may.
        """
        state = {"repeats": 1, **state}  # which version 0.1 did not have
        names = {
            "samples": "the number of images",
            "files": "the image files",
            "seed": "the seed",
            "batch_size": "the global batch size",
            "window": "data.shuffle_window",
            "cycles": "the number of images of each domain and of steps in an epoch",
            "repeats": "the number of repeats",
        }
        for key, now in self.state_dict().items():
            if key in state and state[key] != now:
                raise UserError(
                    f"cannot continue this run exactly: {names[key]} was {state[key]} in the checkpoint and "
                    f"is {now} now (data in '{self.folder.root}'). Go back to the former, or start a new run."
                )
