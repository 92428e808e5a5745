"""Data that fit into memory: tensors with a row for each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from lesam_dist.data.sampling import Sampling
from lesam_dist.parallel.batch import Batch, rows, samples_in, structure, tensors, transform
from lesam_dist.parallel.processes import Distributed


class Table:
    """Samples in memory.

    Args:
        samples: tensors of N rows on the host, alone or in tuples and mappings: a batch is some rows of them.
        root: where they are from, for messages.

    Raises:
        UserError: they have different numbers of rows.
    """

    def __init__(self, samples: Batch, root: str = "the table") -> None:
        self.samples, self.root = samples, root
        self._length = samples_in(samples)

    def __len__(self) -> int:
        return self._length

    @cached_property
    def digest(self) -> str:
        """Of all values and their structure."""
        digest = hashlib.blake2b(structure(self.samples).encode(), digest_size=8)
        for tensor in tensors(self.samples):
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()


class TableLoader:
    """A ``Loader`` of a `Table`, which it keeps on the device.

    Args:
        table: the samples.
        train, batch_size, seed: see `Sampling`.
        world: this process among all.

    Raises:
        UserError: as `Sampling`.
    """

    def __init__(self, table: Table, *, train: bool, batch_size: int, seed: int, world: Distributed) -> None:
        self._sampling = Sampling(table, train, batch_size, seed, world.rank, world.world_size)
        self._device = world.device
        self._samples: Batch | None = transform(table.samples, lambda tensor: tensor.to(world.device))

    def __len__(self) -> int:
        return len(self._sampling)

    def epoch(self, index: int, start: int = 0) -> Iterator[Batch]:
        for numbers in self._sampling.batches(index, start):
            if self._samples is None:
                raise RuntimeError("this loader is closed")
            yield rows(self._samples, torch.from_numpy(numbers).to(self._device))

    def state_dict(self) -> dict[str, Any]:
        return self._sampling.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampling.load_state_dict(state)

    def close(self) -> None:
        self._samples = None
