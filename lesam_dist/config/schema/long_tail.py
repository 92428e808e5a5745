"""Training on a long-tailed part of a data set: how long the tail is, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LongTailMethod = Literal["cross_entropy", "ldam_drw", "logit_adjustment", "glmc"]


@dataclass
class LongTailConfig:
    """A long-tailed training set (task long_tail): classes in label order, each smaller than the one before."""

    imbalance_factor: float = 100.0
    """images of the first class over those of the last; the classes between have them in geometric steps"""
    subset: Literal["ldam", "glmc"] = "ldam"
    """who chooses the images: the code of LDAM-DRW, as most of the field has it, or that of GLMC"""
    method: LongTailMethod = "cross_entropy"
    """what is done about it: nothing; LDAM's margins with deferred reweighting; logit adjustment; or GLMC, whose step
    mixes two batches in two ways, and so makes two forwards where others make one"""
    max_margin: float = 0.5
    """margin of the rarest class, of others by count ** -1/4 (ldam_drw)"""
    scale: float = 30.0
    """factor of the cosines between features and a class's weights (ldam_drw)"""
    reweight_epoch: float | None = None
    """epoch from which on the loss weighs classes by their effective number of samples; null for never (ldam_drw)"""
    reweight_beta: float = 0.9999
    """of n samples (1 - beta ** n) / (1 - beta) are effective, 0 up to but not 1 (ldam_drw)"""
    tau: float = 1.0
    """factor of the logarithms of the classes' shares that are added to the logits (logit_adjustment)"""
    resample: float = 0.0
    """the second batch draws an image of a class of n with a probability in proportion to n ** -resample (glmc)"""
    label_weight: float = 1.2
    """and the second classifier's loss weighs its class in proportion to n ** -label_weight (glmc)"""
    contrast: float = 4.0
    """factor of the cosines between the views (glmc)"""
    mix_alpha: float = 1.0
    """alpha of the Beta distribution of the first batch's share in both views (glmc)"""


OF_LONG_TAIL_METHOD: dict[LongTailMethod, tuple[str, ...]] = {
    "cross_entropy": (),
    "ldam_drw": ("max_margin", "scale", "reweight_epoch", "reweight_beta"),
    "logit_adjustment": ("tau",),
    "glmc": ("resample", "label_weight", "contrast", "mix_alpha"),
}
"""Fields of `LongTailConfig` that one method alone looks at."""
