"""Accuracy of classes with many, medium and few training images (Liu et al., "Open Long-Tailed Recognition", 2019)."""

from __future__ import annotations

from torch import Tensor

_MANY, _FEW = 100, 20


def groups_of(counts: Tensor) -> dict[str, Tensor]:
    """Which classes are in which group, (C,) bool each.

    "many" are classes with more than 100 training images, "few" those with at most 20, "medium" those between.

    Args:
        counts: training images of each class, (C,) int64.
    """
    return {"many": counts > _MANY, "medium": (counts > _FEW) & (counts <= _MANY), "few": counts <= _FEW}


def group_accuracies(right: Tensor, samples: Tensor, counts: Tensor) -> dict[str, float]:
    """The mean of the class accuracies of each group, in per cent.

    A class without validation images counts in no group; a group without classes is left out.

    Args:
        right: validation images of each class that are classified as it, (C,).
        samples: all of each class, (C,).
        counts: training images of each class, (C,) int64.
    """
    seen = {name: group & (samples > 0) for name, group in groups_of(counts).items()}
    return {name: float(100 * (right[of] / samples[of]).mean()) for name, of in seen.items() if of.any()}
