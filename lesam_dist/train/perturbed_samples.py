"""m: how many samples are behind a perturbation, which sets what sharpness-aware training does at scale."""

from __future__ import annotations

import math

from lesam_dist.config.methods import method_of
from lesam_dist.config.schema import Config
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.wrapping import hsdp_sizes


def samples_per_perturbation(config: Config, world: Distributed) -> int | None:
    """m of m-sharpness: samples in the gradient that perturbs (Foret et al. 2021, section 4.1; Andriushchenko and
    Flammarion 2022).

    A process takes its share of a batch, or of a micro-batch that has a perturbation of its own, and of that the part
    ``ascent_fraction``, rounded up; the gradient is averaged over as many processes as the scope says.

    Returns:
        None for what makes no such gradient: the plain optimizers, and methods that perturb by what earlier steps left.
    """
    optimizer, parallel = config.optimizer, config.parallel
    method = method_of(optimizer.name)
    if method is None or method.registration.one_pass:
        return None
    parts = config.data.micro_batches if config.data.accumulation_mode == "micro" else 1
    own = config.data.batch_size // world.world_size // parts
    processes = world.world_size
    if optimizer.scope == "local":
        processes = 1
    elif optimizer.scope == "replica":
        processes = hsdp_sizes(world, parallel.shard_size, parallel.replicate_size)[1]
    return math.ceil(optimizer.ascent_fraction * own) * processes
