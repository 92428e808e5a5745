"""Training labels of which some are wrong: drawn from the run's seed, or given by people (CIFAR-N).

Which labels are changed, and to what, is a function of the seed, the sample's index and the number of samples: the same
on any number of processes, whoever reads them. Of two rates with one seed, the lower one's wrong labels are also wrong
with the higher one (symmetric: the same wrong ones).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.confusable import taken_for
from lesam_dist.data.human_labels import read_human_labels
from lesam_dist.data.order import LABEL_NOISE_STREAM, position_uniforms
from lesam_dist.errors import UserError


class _Relabellable(Protocol):
    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> NDArray[Any]: ...

    def with_labels(self: _S, labels: NDArray[Any]) -> _S: ...


_S = TypeVar("_S", bound=_Relabellable)


def with_label_noise(
    split: _S,
    *,
    kind: str,
    seed: int,
    rate: float | None = None,
    file: str | None = None,
    labels: str | None = None,
) -> _S:
    """The samples of a split with other labels.

    Args:
        split: the training samples.
        kind: "symmetric", "asymmetric" or "human".
        seed: of the run.
        rate: see `symmetric` and `asymmetric`.
        file: of CIFAR-N (human).
        labels: which of those in it (human).

    Raises:
        UserError: for a single class; as `read_human_labels`.
    """
    if len(split.classes) < 2:
        raise UserError(f"data.label_noise.kind is {kind} but there is a single class: no label can be wrong.")
    if kind == "human":
        if file is None or labels is None:
            raise ValueError("human labels need file and labels")
        return split.with_labels(read_human_labels(Path(file), labels, split.labels, len(split.classes)))
    if rate is None:
        raise ValueError(f"{kind} noise needs a rate")
    if kind == "symmetric":
        return split.with_labels(symmetric(split.labels, len(split.classes), rate, seed))
    return split.with_labels(asymmetric(split.labels, taken_for(split.classes), rate, seed))


def symmetric(labels: NDArray[Any], num_classes: int, rate: float, seed: int) -> NDArray[Any]:
    """Exactly ``round(rate * N)`` labels, each changed to one of the *other* classes, all as likely.

    The field has two conventions, and papers often do not say which. Much code (that of DivideMix, for one) draws the
    new label from all classes, so that of ten one in ten "changed" labels stays right: its rate r is 0.9 r here.

    Args:
        labels: integers ``(N,)``.
        num_classes: at least 2.
        rate: from 0 to below 1.
        seed: of the run.

    Returns:
        ``(N,)``, of the same dtype.
    """
    draws = _draws(len(labels), seed)
    wrong = _lowest(draws[:, 0], rate)
    step = 1 + (draws[wrong, 1] * (num_classes - 1)).astype(np.int64)
    changed: NDArray[Any] = labels.copy()
    changed[wrong] = (labels[wrong].astype(np.int64) + step) % num_classes
    return changed


def asymmetric(labels: NDArray[Any], taken_for: dict[int, int], rate: float, seed: int) -> NDArray[Any]:
    """Of each class that is taken for another, exactly ``round(rate * n)`` of its ``n`` labels, changed to that one.

    Args:
        labels: integers ``(N,)``.
        taken_for: of `lesam_dist.data.confusable.taken_for`.
        rate: from 0 to below 1. Above 0.5 most images of a class have another's label.
        seed: of the run.

    Returns:
        ``(N,)``, of the same dtype.
    """
    order = _draws(len(labels), seed)[:, 0]
    changed: NDArray[Any] = labels.copy()
    for label, other in taken_for.items():
        own = np.flatnonzero(labels == label)
        changed[own[_lowest(order[own], rate)]] = other
    return changed


def _draws(n: int, seed: int) -> NDArray[np.float64]:
    return position_uniforms(LABEL_NOISE_STREAM, 2, range(n), seed=seed, epoch=0)


def _lowest(draws: NDArray[np.float64], rate: float) -> NDArray[np.int64]:
    """The indices of a share of the draws, the lowest ones: a lower share's are among a higher one's."""
    return np.argsort(draws, kind="stable")[: round(rate * len(draws))]
