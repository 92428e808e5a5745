"""Wrong labels among the training images, to see what a method makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class LabelNoiseConfig:
    """Which training labels are wrong; those of validation stay as they are."""

    kind: Literal["symmetric", "asymmetric", "human"] | None = None
    """symmetric: any of the other classes, each as likely; asymmetric: the class that it is taken for (CIFAR-10:
    truck to automobile, bird to airplane, deer to horse, cat and dog for each other; CIFAR-100: the next class of the
    same superclass; else the next class); human: those that people gave to CIFAR's images (CIFAR-N); null: none"""
    rate: float | None = None
    """share of the training labels that are changed, exactly (rounded to whole labels), from 0 to below 1 (symmetric);
    of those of each class that is taken for another (asymmetric: rate 0.4 changes 20 % of all labels on CIFAR-10)"""
    file: str | None = None
    """CIFAR-10_human.pt or CIFAR-100_human.pt of github.com/UCSC-REAL/cifar-10-100n (human)"""
    labels: (
        Literal["aggre_label", "worse_label", "random_label1", "random_label2", "random_label3", "noisy_label"] | None
    ) = None
    """which of the labels in the file; noisy_label is CIFAR-100's, the others are CIFAR-10's (human)"""


HUMAN_LABELS = {
    "cifar10": ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3"),
    "cifar100": ("noisy_label",),
}
"""Those that CIFAR-N has, by data set."""
