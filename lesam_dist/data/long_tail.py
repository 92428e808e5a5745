"""A long-tailed part of a balanced training set: the first class keeps its images, the last one in so many of them.

Of class c of C, with at least n images each and an imbalance factor F::

    n_c = floor(n F^(-c / (C - 1)))

for c = 0 .. C - 1 in label order (Cui et al., 2019; Cao et al., 2019), so that n_0 = F n_(C-1). On CIFAR-100, a factor
of 100 leaves 10,847 images, 500 to 5 of a class. Which ones is a convention too: two published ones are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.cifar import CifarSplit
from lesam_dist.data.folder import ImageFolder
from lesam_dist.errors import UserError

Subset = Literal["ldam", "glmc"]
Images = ImageFolder | CifarSplit


def class_counts(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Images of each class, int64 ``(C,)``."""
    return np.bincount(labels, minlength=num_classes)


def long_tailed_counts(largest: int, num_classes: int, imbalance_factor: float) -> list[int]:
    """n_c of each class, where the first keeps ``largest`` images; in the steps of LDAM-DRW's code, which round."""
    ratio = 1 / imbalance_factor
    return [int(largest * ratio ** (c / (num_classes - 1))) for c in range(num_classes)]


def long_tailed(split: Images, imbalance_factor: float, subset: Subset) -> Images:
    """The long-tailed part of a training split, in the split's own order.

    n is the smallest class's number of images, so that no class lacks any; on CIFAR all classes have it.

    Args:
        split: the training images.
        imbalance_factor: F, at least 1, which only makes all classes equally large.
        subset: who chooses the images. "ldam": the code of LDAM-DRW (Cao et al., 2019), as most of the field has it.
            "glmc": the released code of GLMC (Du et al., 2023). Both are the same in every run, whatever its seed.

    Raises:
        UserError: a factor below 1, or one that leaves a class without images.
    """
    if not imbalance_factor >= 1:
        raise UserError(
            f"long_tail.imbalance_factor is {imbalance_factor}: it is how many times as large as the last class the "
            "first one is, so at least 1."
        )
    labels = np.asarray(split.labels)
    num_classes = len(split.classes)
    largest = int(class_counts(labels, num_classes).min())
    if largest == 0:
        empty = split.classes[int(class_counts(labels, num_classes).argmin())]
        raise UserError(f"'{split.root}' has no training images of class '{empty}': no long tail can be made of it.")
    counts = long_tailed_counts(largest, num_classes, imbalance_factor)
    if 0 in counts:
        first = counts.index(0)
        most = next(factor for factor in range(largest, 0, -1) if all(long_tailed_counts(largest, num_classes, factor)))
        raise UserError(
            f"long_tail.imbalance_factor is {imbalance_factor}, which leaves class '{split.classes[first]}' without "
            f"images, since the smallest class of '{split.root}' has {largest}: choose at most {most}."
        )
    return split.take(np.sort(_SUBSETS[subset](labels, counts)))


def _of_ldam(labels: NDArray[np.int64], counts: list[int]) -> NDArray[np.int64]:
    """Shuffle each class, take the first: one generator of NumPy's old kind, with seed 0."""
    generator, chosen = np.random.RandomState(0), []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        generator.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen)


def _of_glmc(labels: NDArray[np.int64], counts: list[int]) -> NDArray[np.int64]:
    """Draw of each class without replacement, with the default seed of that code, as it is since May 2023."""
    generator, chosen = np.random.RandomState(3407), []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        chosen.append(members[generator.choice(len(members), count, replace=False)])
    return np.concatenate(chosen)


_SUBSETS: dict[Subset, Callable[[NDArray[np.int64], list[int]], NDArray[np.int64]]] = {
    "ldam": _of_ldam,
    "glmc": _of_glmc,
}
