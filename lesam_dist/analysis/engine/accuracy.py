"""An accuracy, how far it is to be trusted as an estimate, and the predictions that it is of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.tasks.classification.calibration import calibration_sums, over_processes


@dataclass(frozen=True)
class Accuracy:
    """The share of images that are classified rightly.

    Attributes:
        right: images.
        images: of all.
    """

    right: int
    images: int

    @property
    def percent(self) -> float:
        """The share, in per cent."""
        return 100 * self.right / self.images

    @property
    def standard_error(self) -> float:
        """Of the share as an estimate for all images that there might be, binomial, in per cent; 0 at 0 and 100 %."""
        share = self.right / self.images
        return 100 * math.sqrt(share * (1 - share) / self.images)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"accuracy": self.percent, "standard_error": self.standard_error}


@torch.no_grad()
def predict(objective: Objective, batches: Iterable[Batch]) -> list[list[float]]:
    """`calibration_sums` of these images of all processes, by an objective's model; one forward and one all-reduce."""
    total = torch.zeros((), dtype=torch.float64, device=objective.device)
    for images, labels in batches:
        with objective.computing():
            total = total + calibration_sums(objective.model(images), labels)
    objective.passes["forward"] += 1
    sums: list[list[float]] = over_processes(total, objective.world).tolist()
    return sums
