"""Methods whose radius is a hyper-parameter, in whatever metric and along whatever direction they move."""

from __future__ import annotations

import math
from typing import Any

from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.optim.engine.options import require_nonnegative
from lesam_dist.optim.engine.reference import Radius


class FixedRadius(SharpnessAware):
    """Moves the weights by ``rho``, which every param group has and may change at any time."""

    def check_group(self, group: dict[str, Any]) -> None:
        require_nonnegative(type(self).__name__, "rho", group["rho"])

    def radius(self, group: dict[str, Any]) -> Radius:
        return Radius(sigma=math.inf, rho_max=float(group["rho"]), eps=0.0)
