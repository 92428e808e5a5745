"""What each batch of each epoch holds. The two backends decode what is planned here and decide nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.cycles import Cycles
from lesam_dist.data.errors import Failure, unreadable_image
from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.order import replacements
from lesam_dist.data.sampling import Sampling
from lesam_dist.data.shards import Part
from lesam_dist.data.transform import Draws, Transform, draw
from lesam_dist.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One batch of one rank.

    Attributes:
        paths: the files; where they lie in shards, their names there.
        labels: int64 ``(B,)``.
        draws: its random numbers; None for evaluation.
        epoch: that it is of.
        positions: int64 ``(B,)``, the places of its samples in the epoch's order; for training.
        parts: of shards, in which the files lie; None: they are files.
    """

    paths: list[str]
    labels: NDArray[np.int64]
    draws: Draws | None
    epoch: int
    positions: NDArray[np.int64]
    parts: list[Part] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Sequence[int]) -> Batch:
        """Some of its samples, as a batch."""
        some = list(indices)
        draws = None if self.draws is None else self.draws.take(some)
        paths, parts = [self.paths[i] for i in some], self.parts and [self.parts[i] for i in some]
        return Batch(paths, self.labels[some], draws, self.epoch, self.positions[some], parts)


@dataclass(frozen=True)
class Plan(Sampling):
    """All batches of one rank as files, with crops and flips: like the order a pure function of ``(seed, epoch)``.

    A file that cannot be decoded is replaced by another sample, at the same place and with the same crop and flip.
    Which one is a function of ``(seed, epoch, place in the epoch)`` and of the files themselves: the first of
    `replacements` that can be decoded. So it does not matter who has met the file, or when.

    Attributes:
        bad: files that are known to be broken, for training; None: they are errors.
        window: samples that are shuffled together, where shards are read from front to back; None: all.
        cycles: how domains are sampled, for training; None: all images once in an epoch.
    """

    folder: ImageFolder
    transform: Transform
    bad: BadFiles | None = None
    window: int | None = None
    cycles: Cycles | None = None

    def __len__(self) -> int:
        return super().__len__() if self.cycles is None else self.cycles.steps

    def epoch(self, index: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``index`` (any, in any order) from ``start`` on; evaluation epochs are all the same.

        Raises:
            UserError: there are more bad files than may be.
        """
        paths, labels, shards = self.folder.paths, self.folder.labels, self.folder.shards
        if self.bad is not None:
            self.bad.refresh()
        for i, batch in enumerate(self.batches(index, start), start):
            draws, positions = None, range(0)
            if self.train:
                positions = self.positions(i)
                draws = draw(self.transform, positions, seed=self.seed, epoch=index)
            parts = None if shards is None else [shards.part(j) for j in batch.tolist()]
            own = labels[batch].astype(np.int64, copy=False)
            yield self.mend(Batch([paths[j] for j in batch.tolist()], own, draws, index, np.array(positions), parts))

    def order(self, epoch: int) -> NDArray[np.int64]:
        if self.cycles is not None:
            return self.cycles.order(self.batch_size, seed=self.seed, epoch=epoch)
        if self.window is None or not self.train or self.folder.shards is None:
            return super().order(epoch)
        return self.folder.shards.sequential_order(seed=self.seed, epoch=epoch, window=self.window)

    def state_dict(self) -> dict[str, Any]:
        """With the window, and how domains are sampled, which decide the order."""
        state = super().state_dict() | ({"window": self.window} if self.train else {})
        return state if self.cycles is None else state | {"cycles": [*self.cycles.sizes, self.cycles.steps]}

    def mend(self, batch: Batch) -> Batch:
        """The batch without the files that are known to be bad by now."""
        if self.bad is None or not self.bad.count:
            return batch
        wrong = [i for i, path in enumerate(batch.paths) if path in self.bad]
        if not wrong:
            return batch
        paths, labels, parts = list(batch.paths), batch.labels.copy(), batch.parts and list(batch.parts)
        for i in wrong:
            sample = self._replacement(batch.epoch, int(batch.positions[i]), self.bad)
            paths[i], labels[i] = self.folder.paths[sample], self.folder.labels[sample]
            if parts and self.folder.shards is not None:
                parts[i] = self.folder.shards.part(sample)
        return Batch(paths, labels, batch.draws, batch.epoch, batch.positions, parts)

    def meet(self, failures: Sequence[Failure], batch_size: int) -> None:
        """Take note of images that could not be had, in a batch of so many on this process; `mend` replaces them then.

        Raises:
            UserError: they are errors; or as `BadFiles.meet`.
        """
        if self.bad is None:
            raise unreadable_image(failures[0])
        self.bad.meet(failures, batch_size)

    def _replacement(self, epoch: int, position: int, bad: BadFiles) -> int:
        n = len(self.folder)
        for sample in islice(replacements(n, position, seed=self.seed, epoch=epoch), 100 * n):
            if self.folder.paths[sample] not in bad:
                return sample
        raise UserError(f"no training image in '{self.folder.root}' can be decoded.")
