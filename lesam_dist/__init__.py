"""lesam_dist: LE-SAM (Loss-Equated Sharpness-Aware Minimization) and its relatives, at scale."""

from lesam_dist.optim import LESAM, SAM, CosineBudget, SharpnessAware

__version__ = "0.1.0"
__all__ = ["LESAM", "SAM", "CosineBudget", "SharpnessAware", "__version__"]
