"""One batch again and again, so that input costs nothing: what is faster then was lost to reading images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lesam_dist.data.loader import Loader
from lesam_dist.parallel.batch import Batch, transform


class ReplayLoader:
    """A ``Loader`` of the first batch of epoch 0 of another one, as often as that one has batches.

    It is read at the first epoch that is asked for; then the other loader's threads and processes end, so that they
    take no core. Each time it is a copy on the device, since a batch is the caller's.

    Args:
        loader: of the training images.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._batch: Batch | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, index: int, start: int = 0) -> Iterator[Batch]:
        if start < 0:
            raise ValueError(f"start is {start}: it is a number of batches, at least 0")
        if self._batch is None:
            first = next(self._loader.epoch(0))
            self._batch = transform(first, Tensor.clone)  # the other loader's own memory goes with it
            self._loader.close()
        for _ in range(start, len(self)):
            yield transform(self._batch, Tensor.clone)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)

    def close(self) -> None:
        self._batch = None
        self._loader.close()
