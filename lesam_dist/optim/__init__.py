"""Sharpness-aware optimizers: one file per method, on one protocol (`base`) and one set of operations (`ops`)."""

from lesam_dist.optim.base import SharpnessAware
from lesam_dist.optim.budget import CosineBudget
from lesam_dist.optim.lesam import LESAM
from lesam_dist.optim.sam import SAM

__all__ = ["LESAM", "SAM", "CosineBudget", "SharpnessAware"]
