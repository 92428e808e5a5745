"""What a config must not say of a long tail."""

from __future__ import annotations

from lesam_dist.config.changes import changes
from lesam_dist.config.schema import OF_LONG_TAIL_METHOD, Config, LongTailConfig
from lesam_dist.errors import UserError


def check_long_tail(config: Config) -> None:
    """Refuse what would have no effect, and numbers out of range.

    Raises:
        UserError: for the first such value, with the remedy.
    """
    if config.task != "long_tail":
        _refuse_all(config)
        return
    _check_numbers(config.long_tail)
    _refuse_of_others(config.long_tail)
    _check_data(config)
    start = config.long_tail.reweight_epoch
    if start is not None and start >= config.epochs:
        raise UserError(
            f"long_tail.reweight_epoch is {start:g} but the run has {config.epochs} epochs: the reweighting would "
            "never start. Choose an earlier epoch, or null."
        )


def _refuse_all(config: Config) -> None:
    for name, value, default in changes(config.long_tail):
        raise UserError(
            f"long_tail.{name} is {value} but task is {config.task}, which has no long tail: choose task long_tail, or "
            f"leave it at {_shown(default)}."
        )


def _refuse_of_others(section: LongTailConfig) -> None:
    for method, names in OF_LONG_TAIL_METHOD.items():
        for name, value, default in changes(section, names) if method != section.method else ():
            raise UserError(
                f"long_tail.{name} is {value} but long_tail.method is {section.method}: only {method} has it. "
                f"Choose {method}, or leave it at {_shown(default)}."
            )


def _check_numbers(section: LongTailConfig) -> None:
    for name in ("max_margin", "tau", "resample", "label_weight", "contrast"):
        if not getattr(section, name) >= 0:
            raise UserError(f"long_tail.{name} is {getattr(section, name)}: it must be at least 0.")
    for name in ("scale", "mix_alpha"):
        if not getattr(section, name) > 0:
            raise UserError(f"long_tail.{name} is {getattr(section, name)}: it must be above 0.")
    if not section.imbalance_factor >= 1:
        raise UserError(
            f"long_tail.imbalance_factor is {section.imbalance_factor}: it is how many times as large as the last "
            "class the first one is, so at least 1."
        )
    if not 0 <= section.reweight_beta < 1:
        raise UserError(f"long_tail.reweight_beta is {section.reweight_beta}: it must be in [0, 1).")
    if section.reweight_epoch is not None and not section.reweight_epoch >= 0:
        raise UserError(f"long_tail.reweight_epoch is {section.reweight_epoch}: it must be at least 0, or null.")


def _check_data(config: Config) -> None:
    data, method = config.data, config.long_tail.method
    if method == "glmc" and not config.on_device:
        raise UserError(
            "long_tail.method is glmc but data.builtin is null: its batches, two with two views each, are made of "
            "images that stay on the device, as only built-in data do. Choose cifar10, cifar100, mnist5k or digits, or "
            "another method."
        )
    if data.label_noise.kind is not None:
        raise UserError(
            f"data.label_noise.kind is {data.label_noise.kind} but task is long_tail, whose classes are counted by "
            "their true labels: leave it null."
        )
    for name, value, default in changes(data, ("mixup", "cutmix", *(("repeats",) if method == "glmc" else ()))):
        raise UserError(
            f"data.{name} is {value} but task is long_tail with long_tail.method {method}, which does not have it: "
            f"leave it at {default}."
        )
    for name, value, default in changes(config.loss):
        raise UserError(
            f"loss.{name} is {value} but task is long_tail, whose losses are those of long_tail.method: leave it at "
            f"{_shown(default)}."
        )


def _shown(value: object) -> object:
    return "null" if value is None else value
