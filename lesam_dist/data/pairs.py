"""Batches in pairs, for methods that mix a shuffled batch with a rebalanced one: GLMC (Du et al., CVPR 2023).

The first batch of a step is the one that every other loader gives. The second is drawn with replacement, sample by
sample, class c with a probability of p_c over all its images::

    p_c ~ n_c^(1 - r)        r = 0: as the data has them; r = 1: all classes alike

so each image of class c has a weight of n_c^-r. Of each image there are two views, cropped and flipped by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lesam_dist.data.cifar import CifarSplit, DeviceImages
from lesam_dist.data.cifar_transform import DRAWS, CifarTransform, draw, draws_of
from lesam_dist.data.long_tail import class_counts
from lesam_dist.data.order import PAIRS_STREAM, position_uniforms
from lesam_dist.data.sampling import Sampling
from lesam_dist.errors import UserError

_VIEWS = 4  # two of each batch
_NUMBERS = 1 + (_VIEWS - 1) * DRAWS  # the second batch's sample, and the draws of all views but the first


class PairLoader:
    """A ``Loader`` of training batches of images that stay on the device, as dicts.

    Like every loader's, a batch is a function of ``(seed, epoch, position)``: the number of processes and what was read
    before do not matter. ``images`` and ``labels`` are those of `CifarLoader`, to the bit.

    Args:
        split: the training images; each class has at least one.
        transform, batch_size, seed, rank, world_size, device: see `CifarLoader`.
        resample: r above.

    Raises:
        UserError: as `Sampling`.
    """

    def __init__(
        self,
        split: CifarSplit,
        *,
        transform: CifarTransform,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        resample: float,
    ) -> None:
        self._sampling = Sampling(split, True, batch_size, seed, rank, world_size)
        self._transform, self._resample = transform, resample
        self._images = DeviceImages(split, transform, device)
        weights = class_counts(split.labels, len(split.classes)).astype(np.float64)[split.labels] ** -resample
        self._cumulative = np.cumsum(weights)

    def __len__(self) -> int:
        return len(self._sampling)

    def epoch(self, index: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield ``images``, ``second_view`` of the first batch, ``other_images``, ``other_second_view`` of the second,
        each float32 ``(B, 3, S, S)``, and their ``labels`` and ``other_labels``, int64 ``(B,)``."""
        sampling = self._sampling
        for i, samples in enumerate(sampling.batches(index, start), start):
            positions = sampling.positions(i)
            first = draw(self._transform, positions, seed=sampling.seed, epoch=index)
            u = position_uniforms(PAIRS_STREAM, _NUMBERS, positions, seed=sampling.seed, epoch=index).T
            others = self._others(u[0])
            crops = [first, *(draws_of(self._transform, u[1 + k * DRAWS :][:DRAWS]) for k in range(_VIEWS - 1))]
            of_views = zip((samples, samples, others, others), crops, strict=True)
            numbers = np.concatenate([np.stack([each, *draws]) for each, draws in of_views], axis=1)
            images, labels = self._images.batch(numbers)
            names = ("images", "second_view", "other_images", "other_second_view")
            of_first, _, of_other, _ = labels.chunk(_VIEWS)
            yield {**dict(zip(names, images.chunk(_VIEWS), strict=True)), "labels": of_first, "other_labels": of_other}

    def _others(self, u: NDArray[np.float64]) -> NDArray[np.int64]:
        """The samples of the second batch, from uniform numbers."""
        cumulative = self._cumulative
        found: NDArray[np.int64] = np.searchsorted(cumulative, u * cumulative[-1], side="right")
        return found.clip(max=len(cumulative) - 1)  # u * total may round up to the total

    def state_dict(self) -> dict[str, Any]:
        return self._sampling.state_dict() | {"resample": self._resample}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampling.load_state_dict(state)
        if state.get("resample", self._resample) != self._resample:
            raise UserError(
                f"cannot continue this run exactly: long_tail.resample was {state['resample']} in the checkpoint and "
                f"is {self._resample} now. Go back to the former, or start a new run."
            )

    def close(self) -> None:
        self._images.close()
