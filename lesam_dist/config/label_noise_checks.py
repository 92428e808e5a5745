"""What a config must not say of label noise."""

from __future__ import annotations

from lesam_dist.config.changes import changes
from lesam_dist.config.schema import HUMAN_LABELS, DataConfig
from lesam_dist.errors import UserError

_HUMAN = ("file", "labels")


def check_label_noise(data: DataConfig) -> None:
    """Refuse what is missing, out of range, or would have no effect.

    Raises:
        UserError: for the first such field of ``data.label_noise``, with the remedy.
    """
    noise = data.label_noise
    if noise.kind is None:
        _refuse(data, ("rate", *_HUMAN), "choose symmetric, asymmetric or human")
    elif noise.kind == "human":
        _check_human(data)
    elif noise.rate is None:
        raise UserError(
            f"data.label_noise.kind is {noise.kind} but data.label_noise.rate is null: say which share of the training "
            "labels is wrong, e.g. 0.4."
        )
    elif not 0 <= noise.rate < 1:
        raise UserError(f"data.label_noise.rate is {noise.rate}: it must be at least 0 and below 1.")
    else:
        _refuse(data, _HUMAN, "choose human")


def _check_human(data: DataConfig) -> None:
    noise = data.label_noise
    _refuse(data, ("rate",), "choose symmetric or asymmetric")
    known = HUMAN_LABELS.get(data.builtin or "")
    if known is None:
        raise UserError(
            f"data.label_noise.kind is human but data.builtin is {data.builtin or 'null'}: people's labels are of "
            "cifar10 and cifar100. Choose one of these, or symmetric."
        )
    if noise.file is None:
        name = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}[data.builtin or ""]
        raise UserError(
            f"data.label_noise.kind is human but data.label_noise.file is null: give {name} of "
            "github.com/UCSC-REAL/cifar-10-100n, which is not downloaded."
        )
    if noise.labels not in known:
        raise UserError(
            f"data.label_noise.labels is {noise.labels or 'null'} but data.builtin is {data.builtin}: choose "
            f"{'one of ' if len(known) > 1 else ''}{', '.join(known)}."
        )


def _refuse(data: DataConfig, names: tuple[str, ...], remedy: str) -> None:
    """What a kind of noise does not look at."""
    for name, value, _ in changes(data.label_noise, names):
        raise UserError(
            f"data.label_noise.{name} is {value} but data.label_noise.kind is {data.label_noise.kind or 'null'}, which "
            f"does not look at it: {remedy}, or leave it null."
        )
