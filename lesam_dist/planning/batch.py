"""Whether a batch can be divided among processes. Needs no torch."""

from __future__ import annotations

from lesam_dist.config.schema import Config
from lesam_dist.errors import UserError


def check_batch(config: Config, processes: int) -> None:
    """Raise a UserError unless these processes divide the batch, as a run would refuse it."""
    batch, micro = config.data.batch_size, config.data.micro_batches
    if batch % processes:
        raise UserError(
            f"--gpus {processes} does not divide data.batch_size {batch}: choose another batch, or let it grow with "
            "the GPUs by --batch_per_gpu N."
        )
    if batch // processes % micro:
        raise UserError(
            f"data.micro_batches {micro} does not divide the {batch // processes} images that each of {processes} GPUs "
            f"takes of a batch of {batch}: choose a divisor."
        )
