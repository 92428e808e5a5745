"""What `Updates` tells of a step, where a test does not look at it."""

from __future__ import annotations

from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.meter import Meter
from lesam_dist.train.phases import Clock, Phases, event_of


def told(world: Distributed) -> tuple[Phases, Meter]:
    """Phases and a meter on the host's clock."""
    phases = Phases(world, Clock(event_of(world.device)))
    return phases, Meter(phases.clock, 1, world.world_size, ())
