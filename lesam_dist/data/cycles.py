"""Batches of several domains, as many images of each, sampled without end: an epoch is a number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.order import DOMAIN_STREAM


@dataclass(frozen=True)
class Cycles:
    """How the training images of some domains, which lie one after the other, are sampled.

    Each domain is read in an order of its own, drawn anew whenever all of it has been read; where its images end within
    a batch, the next order goes on there. An epoch is no pass over the images: it is ``steps`` batches.

    Attributes:
        sizes: images of each domain.
        steps: batches of an epoch.
    """

    sizes: tuple[int, ...]
    steps: int

    def order(self, batch_size: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, int64 ``(steps * batch_size,)``.

        A batch holds its domains' images in turn, so that every process's part of it does too.
        """
        domains = len(self.sizes)
        share = batch_size // domains
        first = epoch * self.steps * share
        order = np.empty((self.steps * share, domains), dtype=np.int64)
        begin = 0
        for domain, size in enumerate(self.sizes):
            cycles = range(first // size, (first + len(order) - 1) // size + 1)
            read = np.concatenate([_permutation(size, seed, domain, cycle) for cycle in cycles])
            skipped = first - cycles.start * size
            order[:, domain] = begin + read[skipped : skipped + len(order)]
            begin += size
        return order.ravel()


def _permutation(size: int, seed: int, domain: int, cycle: int) -> NDArray[np.int64]:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(DOMAIN_STREAM, domain, cycle))).permutation(
        size
    )
