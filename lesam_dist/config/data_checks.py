"""What a config must not say of data and loss."""

from __future__ import annotations

from lesam_dist.config.schema import CIFAR_ONLY, DALI_ONLY, FOLDERS_ONLY, Config, DataConfig, LossConfig
from lesam_dist.errors import UserError


def check_data(config: Config) -> None:
    """Refuse what would have no effect."""
    on_device = config.on_device
    if on_device and config.data.skip_list is not None:
        raise UserError(
            f"data.skip_list is '{config.data.skip_list}' but data.builtin is {config.data.builtin}: only class "
            "folders have image files to leave out. Leave it null."
        )
    default = type(config.data)()
    if on_device and config.data.order != default.order:
        raise UserError(
            f"data.order is {config.data.order} but data.builtin is {config.data.builtin}, which is kept in memory: "
            "leave it at random."
        )
    _check_dali(config.data)
    if config.data.order == "random" and config.data.shuffle_window != default.shuffle_window:
        raise UserError(
            f"data.shuffle_window is {config.data.shuffle_window} but data.order is random, which shuffles all images: "
            f"choose sequential, or leave it at {default.shuffle_window}."
        )
    for name in FOLDERS_ONLY if on_device else CIFAR_ONLY:
        value = getattr(config.data, name)
        if value != getattr(default, name):
            folders = "class folders" if config.task != "long_tail" else "class folders of your own"
            kind = folders if on_device else "cifar10 and cifar100"
            raise UserError(
                f"data.{name} is {value} but data.builtin is {config.data.builtin or 'null'}: only {kind} are "
                f"augmented that way. Leave it at {getattr(default, name)}."
            )


def _check_dali(data: DataConfig) -> None:
    default = DataConfig()
    for name in DALI_ONLY if data.backend != "dali" else ():
        if getattr(data, name) != getattr(default, name):
            raise UserError(
                f"data.{name} is {getattr(data, name)} but data.backend is {data.backend}: it is for DALI. Choose "
                f"dali, or leave it at {getattr(default, name)}."
            )
    if not 0 <= data.dali_hardware_load <= 1:
        raise UserError(f"data.dali_hardware_load is {data.dali_hardware_load}: it must be in [0, 1].")
    if data.dali_preallocate is not None and not all(1 <= side <= 1 << 16 for side in data.dali_preallocate):
        raise UserError(
            f"data.dali_preallocate is {list(data.dali_preallocate)}: give width and height, 1 to {1 << 16} pixels."
        )
    if data.dali_decoder == "cpu" and (data.dali_hardware_load, data.dali_preallocate) != (0.65, None):
        raise UserError(
            "data.dali_hardware_load or data.dali_preallocate is set but data.dali_decoder is cpu: they are for "
            "decoding on the GPU. Choose gpu, or leave them out."
        )


def check_loss(loss: LossConfig) -> None:
    """Refuse values out of range, and a threshold that is not looked at."""
    if not 0 <= loss.label_smoothing < 1:
        raise UserError(f"loss.label_smoothing is {loss.label_smoothing}: it must be in [0, 1).")
    if loss.binary_threshold is None:
        return
    if not 0 <= loss.binary_threshold < 1:
        raise UserError(f"loss.binary_threshold is {loss.binary_threshold}: it must be in [0, 1), or null.")
    if loss.name != "binary":
        raise UserError(
            f"loss.binary_threshold is {loss.binary_threshold} but loss.name is {loss.name}: only binary has it. "
            "Choose binary, or leave it at null."
        )
