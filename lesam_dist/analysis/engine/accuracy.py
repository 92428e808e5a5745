"""An accuracy, and how far it is to be trusted as an estimate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


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
