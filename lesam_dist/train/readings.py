"""What is logged of a step: read from the device in one go, as means over the processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lesam_dist.data.bad_files import BadFiles
from lesam_dist.optim import SharpnessAware
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import reduce_max
from lesam_dist.train.divergence import NonFiniteSteps
from lesam_dist.train.meter import SHARE, Meter
from lesam_dist.train.phases import DATA

_ROUNDED = 1.5  # by this factor the perturbation may be off before a warning


class Reading(NamedTuple):
    """``values`` to log, and how many steps were not finite: so far, and since the last finite one."""

    values: dict[str, float]
    nonfinite: float
    in_a_row: float


class Readings:
    """Reads what the optimizer and the counters know of the last step; every process reads after the same steps.

    Args:
        world: this process among all.
        optimizer: whose telemetry is read.
        nonfinite: of the run.
        bad_files: of the training images, if they are files; their number is logged once there is one.
    """

    def __init__(
        self,
        world: Distributed,
        optimizer: SharpnessAware,
        nonfinite: NonFiniteSteps,
        bad_files: BadFiles | None = None,
    ) -> None:
        self._world, self._optimizer, self._nonfinite, self._bad_files = world, optimizer, nonfinite, bad_files
        self._warned = False

    def read(self, loss: Tensor, meter: Meter) -> Reading:
        """One all-reduce of a few numbers, one of the longest wait for data, and two host syncs."""
        counts = {"total": self._nonfinite.total, "in_a_row": self._nonfinite.in_a_row}
        scalars: dict[str, Tensor] = {"loss": loss, **counts}
        names = ["grad_norm", "skipped"]
        names += [] if isinstance(self._optimizer, Plain) else ["perturbed_loss", "rho"]
        names += ["realized_rho"] if self._optimizer.measure_rho else []
        scalars |= {name: self._optimizer.telemetry[name].to(loss.device) for name in names}
        rates = meter.rates()
        if self._bad_files is not None:
            scalars["bad_files"] = torch.tensor(float(self._bad_files.own), device=loss.device)
        shares = [name for name in rates if name == DATA or name.startswith(SHARE)]
        scalars |= zip(shares, torch.tensor([rates.pop(name) for name in shares], device=loss.device), strict=True)
        longest = scalars[DATA].clone()  # of all ranks': one that starves holds up the others
        reduce_max(longest)
        rates[f"{DATA}_max"] = float(longest)
        means = dict(zip(scalars, self._world.mean(list(scalars.values())), strict=True))
        total, in_a_row = (means.pop(name) for name in counts)
        if bad := means.pop("bad_files", 0.0):
            means["bad_files"] = bad * self._world.world_size
        return Reading(means | rates, total, in_a_row)

    def rounding(self, step: int, values: dict[str, float]) -> str | None:
        """What to say, once, where bfloat16 weights moved by much more or less than rho; None for nothing."""
        rho, realized = values.get("rho", 0.0), values.get("realized_rho")
        if self._warned or realized is None or rho <= 0 or 1 / _ROUNDED <= realized / rho <= _ROUNDED:
            return None
        self._warned = True
        return (
            f"warning: at step {step} rho was {rho:.4g} but the weights, stored in bfloat16, moved by {realized:.4g}: "
            "rounding spoils the perturbation. Use precision.weights fp32, or a larger sigma or rho. This is said "
            "once; realized_rho is in the log."
        )
