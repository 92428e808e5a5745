"""lesam_dist: LE-SAM (Loss-Equated Sharpness-Aware Minimization) and its relatives, at scale."""

from lesam_dist import optim
from lesam_dist.optim import *  # noqa: F403

__version__ = "0.1.0"
__all__ = ["__version__"]
__all__ += optim.__all__
