"""A run whose devices wait for images: what to change, and by how much where that can be told."""

from __future__ import annotations

import math

from lesam_dist.config.schema import Config
from lesam_dist.parallel.place import usable_cores
from lesam_dist.parallel.processes import Distributed

_SHARE = 0.2  # of the time, above which waiting is worth a warning
_STEPS = 10  # that it is taken over at least


class InputBound:
    """Warns, once, that a run waits for its data. The first interval is left out, in which readers start.

    Args:
        config: the run.
        world: this process among all.
    """

    def __init__(self, config: Config, world: Distributed) -> None:
        self._config, self._world = config, world
        self._last: int | None = None
        self._waited, self._steps = 0.0, 0
        self._said = config.dry_run  # which reads nothing

    def warning(self, step: int, wait: float) -> str | None:
        """What to say after step ``step``; None for nothing.

        Args:
            step: at which a line is logged.
            wait: share of the time since the last line in which the process that waits most had no batch.
        """
        steps = 0 if self._last is None else step - self._last
        self._last = step
        if self._said or steps <= 0:  # the first interval, or a run that went back
            return None
        self._waited += steps * wait
        self._steps += steps
        if self._steps < _STEPS:
            return None
        share = self._waited / self._steps
        self._waited, self._steps = 0.0, 0
        if share < _SHARE:
            return None
        self._said = True
        return (
            f"warning: {share:.0%} of the time until step {step} passed without a batch to work on (data_wait_max). "
            f"{remedy(self._config, self._world, share)} This is said once."
        )


def remedy(config: Config, world: Distributed, share: float) -> str:
    """What to change in a run that waits for its data for ``share`` of the time, in (0, 1)."""
    data = config.data
    if config.on_device:
        return "The images are on the device itself: a larger data.batch_size has less to do per image."
    cores = max(1, usable_cores() // world.local_world_size)
    wanted = math.ceil(data.workers / (1 - min(share, 0.99)))  # as many more as the devices could take
    if data.workers < cores and world.device.type != "cpu":  # whose cores have the network to compute
        more = min(wanted, cores)
        enough = "" if wanted <= cores else f", which is not enough: it would take {wanted}"
        return f"Set data.workers to {more} (now {data.workers}; {cores} cores for each process{enough})."
    others = ["pack the images once, resized (lesam-dist pack)"]
    if world.device.type == "cpu":
        if data.backend == "dali":  # on a CPU the slower of the two, once it has started
            others.append("choose data.backend torchvision (now dali)")
        return f"Reading takes cores that the network computes on: {', or '.join(others)}."
    if data.backend == "torchvision":
        others.append("choose data.backend dali (now torchvision)")
    others.append(f"give each process {wanted} cores and data.workers")
    return f"All {cores} cores of a process are reading (data.workers {data.workers}): {', or '.join(others)}."
