"""The interface that the trainer sees, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.cycles import Cycles
from lesam_dist.data.dali_options import DaliOptions
from lesam_dist.data.folder import ImageFolder
from lesam_dist.data.plan import Plan
from lesam_dist.data.transform import Transform
from lesam_dist.errors import UserError, unknown_name
from lesam_dist.parallel.batch import Batch

BACKENDS = ("dali", "torchvision")


class Loader(Protocol):
    """Batches of one rank.

    Epoch ``k`` is the same whenever and however often it is asked for: what was read before, a checkpoint in
    between and the number of processes do not matter. One epoch is read at a time: asking for the next ends
    the one before, which may have been left halfway.
    """

    def __len__(self) -> int:
        """Batches per epoch on this rank; for training the same on all ranks."""
        ...

    def epoch(self, index: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches on the device, see `lesam_dist.parallel.batch`.

        Of images, those of this package: ``(images, labels)``, normalised float32 ``(B, 3, S, S)`` and int64 ``(B,)``.
        A batch is the caller's: it stays valid for as long as it is referenced, so two passes can read it.

        Args:
            index: of the epoch, not negative.
            start: batches of this rank to leave out, whose files are not opened. The others are what they are in the
                whole epoch, to the bit. A global training batch holds the same samples for any number of processes, so
                those from ``start`` on are what the batches before did not hold, after a change of that number too.

        Raises:
            ValueError: ``start`` is negative.
            UserError: an image cannot be decoded, or too many; names the file.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this data is, at an epoch boundary. The same on all ranks, and for any number of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make sure that ``epoch(k)`` is that of the run which saved ``state``, or raise a UserError."""
        ...

    def close(self) -> None:
        """Free threads, processes and buffers."""
        ...


def build_loader(
    folder: ImageFolder,
    *,
    backend: str,
    train: bool,
    transform: Transform,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
    workers: int,
    repeats: int = 1,
    bad_files: BadFiles | None = None,
    window: int | None = None,
    cycles: Cycles | None = None,
    dali: DaliOptions | None = None,
) -> Loader:
    """A loader of ``folder`` for one rank. Both backends read the same samples with the same crops and flips.

    Args:
        folder: from ``scan_split`` or ``open_splits``.
        backend: ``"dali"`` or ``"torchvision"``.
        train: shuffle, crop and flip at random, drop the last incomplete global batch.
        transform: sizes and ranges.
        batch_size: over all ranks for training; per rank for evaluation.
        seed: not negative, the same on all ranks.
        rank: of this process, below ``world_size``.
        world_size: number of processes.
        device: where the batches go. On a GPU, DALI decodes and resizes there.
        workers: DALI threads (at least one), or torchvision processes (0: load in this process).
        repeats: times that each image of a training batch is in it, see `Sampling`.
        bad_files: for training, of the same ``rank``: images that cannot be decoded are kept there and replaced by
            others, see `Plan`. None: they are errors.
        window: read the shards of a packed data set from front to back, and shuffle so many samples together; see
            `Shards.sequential_order`. None: shuffle all.
        cycles: for training on several domains, how they are sampled; None: all images once in an epoch.
        dali: how DALI works, where it is the backend.

    Raises:
        UserError: an argument cannot be used, or DALI is not installed.
    """
    if backend not in BACKENDS:
        raise unknown_name("data backend", backend, BACKENDS)
    if workers < 0:
        raise UserError(f"workers is {workers}: use no negative number.")
    bad = bad_files if train else None
    plan = Plan(
        folder,
        train,
        batch_size,
        seed,
        rank,
        world_size,
        transform,
        bad,
        window,
        cycles if train else None,
        repeats=repeats if train else 1,
    )
    if backend == "dali":
        try:
            from lesam_dist.data.dali import DaliLoader
        except ImportError as error:
            raise UserError(
                f"the data backend 'dali' needs NVIDIA DALI, which cannot be imported ({error}): "
                'pip install "lesam-dist[dali]" (for CUDA 12: "lesam-dist[dali-cuda120]"), or choose --data.backend '
                "torchvision."
            ) from error
        return DaliLoader(plan, device, workers, dali)
    from lesam_dist.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(plan, device, workers)
