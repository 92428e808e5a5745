"""A method that the project does not have, as a user writes one: nothing else knows of it."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim import SAM
from lesam_dist.optim.engine.arguments import Positive
from lesam_dist.optim.engine.wrapper import BaseOptimizer


class Halved(SAM, name="halved", along="g, a part of the way"):
    """SAM with a part of its radius.

    Args:
        rho: radius.
        part: of it that is gone.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        *,
        rho: Positive = 0.1,
        part: Positive = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho * part, **kwargs)
