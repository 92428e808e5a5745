"""What a dry run changes in a config, so that it takes two steps and seconds."""

from __future__ import annotations

from collections.abc import Collection

from lesam_dist.config.schema import Config
from lesam_dist.parallel.processes import Distributed

_IMAGES = 4  # of each process in a micro-batch on a CPU


def shorten(config: Config, world: Distributed, given: Collection[str]) -> None:
    """Change a config in place.

    Args:
        config: the run.
        world: this process among all.
        given: fields that stay as they are on a CPU, by dotted path.
    """
    if world.device.type == "cpu":
        _make_small(config, world, given)
    if world.world_size == 1 and "parallel.reduce_dtype" not in given:
        config.parallel.reduce_dtype = "fp32"  # nothing is reduced
    config.epochs = 1
    config.schedule.lr_warmup_epochs = config.schedule.sigma_warmup_epochs = 0
    config.schedule.anneal_start_epoch = None
    config.logging.every_steps = 1


def _make_small(config: Config, world: Distributed, given: Collection[str]) -> None:
    """Make a large recipe one that a CPU can try: few images, in float32, in which a CPU is faster."""
    data, precision, changed = config.data, config.precision, []
    each = _IMAGES * data.micro_batches
    batch, evaluated = min(data.batch_size, each * world.world_size), min(data.eval_batch_size, _IMAGES)
    if "data.batch_size" not in given and batch < data.batch_size:
        changed.append(f"batch {batch} for {data.batch_size}")
        data.batch_size = batch
    if "data.eval_batch_size" not in given:
        data.eval_batch_size = evaluated
    others = (precision.weights, precision.gather_dtype)
    if "precision.compute" not in given and precision.compute != "fp32" and others == ("fp32", "fp32"):
        changed.append(f"fp32 for {precision.compute}")
        precision.compute = "fp32"
    if changed and world.is_main:
        print(f"dry run on a CPU: {', '.join(changed)}; flags such as --data.batch_size change that", flush=True)
