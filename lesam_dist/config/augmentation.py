"""What a config must not say of mixing, augmentation, repeated images and image sizes by epoch."""

from __future__ import annotations

from itertools import pairwise

from lesam_dist.config.schema import Config, DataConfig
from lesam_dist.errors import UserError

_COLORS = ("brightness", "contrast", "saturation", "hue")
_LARGEST = 1 << 14  # pixels; more is a typing error


def check_augmentation(config: Config) -> None:
    """Refuse what would have no effect, or cannot be done with any data.

    Raises:
        UserError: for the first such value, with the remedy.
    """
    _check_randaugment(config.data)
    _check_color(config.data)
    _check_squash(config.data)
    _check_mixing(config.data)
    _check_repeats(config.data)
    _check_sizes(config)


def _check_randaugment(data: DataConfig) -> None:
    default = DataConfig()
    for name in ("randaugment_ops", "randaugment_magnitude"):
        value = getattr(data, name)
        if data.auto_augment != "randaugment" and value != getattr(default, name):
            raise UserError(
                f"data.{name} is {value} but data.auto_augment is {data.auto_augment}: only randaugment has it. "
                f"Choose randaugment, or leave it at {getattr(default, name)}."
            )


def _check_color(data: DataConfig) -> None:
    for name, amount in zip(_COLORS, data.color_jitter, strict=True):
        most = 0.5 if name == "hue" else 100.0
        if not 0 <= amount <= most:
            raise UserError(
                f"data.color_jitter is {list(data.color_jitter)}: {name} is {amount}, and must be at least 0 and at "
                f"most {most:g}."
            )


def _check_squash(data: DataConfig) -> None:
    default = DataConfig().val_resize
    if not data.val_keep_aspect and data.val_resize != default:
        raise UserError(
            f"data.val_resize is {data.val_resize} but data.val_keep_aspect is false, which resizes to data.val_crop "
            f"or data.image_size at once: leave val_resize at {default}, or val_keep_aspect at true."
        )


def _check_mixing(data: DataConfig) -> None:
    if not data.mix_probability > 0:
        raise UserError(
            f"data.mix_probability is {data.mix_probability}: it must be above 0. To mix nothing, set data.mixup and "
            "data.cutmix to 0."
        )
    if data.mix_probability != 1 and not (data.mixup or data.cutmix):
        raise UserError(
            f"data.mix_probability is {data.mix_probability} but data.mixup and data.cutmix are 0: nothing is mixed. "
            "Set one of them, e.g. --data.mixup 0.2, or leave it at 1."
        )


def _check_repeats(data: DataConfig) -> None:
    distinct, rest = divmod(data.batch_size, data.repeats)
    if rest:
        raise UserError(
            f"data.repeats {data.repeats} does not divide data.batch_size {data.batch_size}: each image of a batch is "
            "in it equally often. Choose a divisor."
        )
    if distinct == 1 and data.repeats > 1 and (data.mixup or data.cutmix):
        raise UserError(
            f"data.repeats is {data.repeats} and data.batch_size {data.batch_size}, so each image would be mixed with "
            "itself: choose fewer repeats, or a larger batch."
        )


def _check_sizes(config: Config) -> None:
    sizes = config.schedule.image_size
    if sizes is None:
        return
    field, shown = "schedule.image_size", [list(pair) for pair in sizes or ()]
    if config.on_device:
        raise UserError(
            f"{field} is {shown} but data.builtin is {config.data.builtin}: only class folders are read in several "
            "sizes. Leave it at null."
        )
    epochs = [epoch for epoch, _ in sizes]
    if not epochs or epochs[0] != 0 or any(a >= b for a, b in pairwise(epochs)):
        raise UserError(
            f"{field} is {shown}: it needs [epoch, pixels] pairs with rising epochs, the first of them 0, e.g. "
            "[[0,128],[30,224]]."
        )
    if epochs[-1] >= config.epochs:
        raise UserError(
            f"{field} has epoch {epochs[-1]} but the run has {config.epochs} epochs: that size would never be used. "
            "Leave it out, or begin earlier."
        )
    for _, pixels in sizes:
        if not 1 <= pixels <= _LARGEST:
            raise UserError(f"{field} has {pixels} pixels: it must be at least 1 and at most {_LARGEST}.")
