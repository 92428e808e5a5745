"""Sharpness-aware optimizers: one file per method, on one protocol (`base`) and one set of operations (`ops`)."""

from lesam_dist.optim.asam import ASAM, adaptive_groups
from lesam_dist.optim.base import SharpnessAware
from lesam_dist.optim.budget import CosineBudget
from lesam_dist.optim.eigen import EigenSAM
from lesam_dist.optim.esam import ESAM
from lesam_dist.optim.fisher import FisherSAM
from lesam_dist.optim.friendly import FriendlySAM
from lesam_dist.optim.gsam import GSAM
from lesam_dist.optim.lesam import LESAM
from lesam_dist.optim.looksam import LookSAM
from lesam_dist.optim.msam import MSAM
from lesam_dist.optim.s2sam import S2SAM
from lesam_dist.optim.sam import SAM
from lesam_dist.optim.samon import SAMON, norm_groups
from lesam_dist.optim.ssam import SSAM
from lesam_dist.optim.wsam import WSAM

__all__ = [
    "ASAM",
    "ESAM",
    "GSAM",
    "LESAM",
    "MSAM",
    "S2SAM",
    "SAM",
    "SAMON",
    "SSAM",
    "WSAM",
    "CosineBudget",
    "EigenSAM",
    "FisherSAM",
    "FriendlySAM",
    "LookSAM",
    "SharpnessAware",
    "adaptive_groups",
    "norm_groups",
]
