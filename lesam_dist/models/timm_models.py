"""timm's image classifiers by name, ``timm/NAME``, where timm is installed."""

from __future__ import annotations

from typing import Any

from torch import nn

from lesam_dist.errors import UserError, unknown_name

PREFIX = "timm/"


def require_timm(name: str) -> None:
    """Raise a UserError unless timm is installed and has this model.

    Args:
        name: with the prefix, without a tag of pretrained weights.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model '{name}' is one of timm's, which cannot be imported ({error}): pip install 'lesam-dist[timm]'."
        ) from error
    own = name.removeprefix(PREFIX)
    if own not in (names := timm.list_models()):
        short, _, tag = own.partition(".")
        if tag and short in names:
            raise UserError(
                f"model '{name}' names pretrained weights, '{tag}', which are not loaded: give '{PREFIX}{short}'."
            )
        raise unknown_name("model", name, [PREFIX + known for known in names])


def build_timm(name: str, num_classes: int, image_size: int, drop_path: float | None) -> nn.Module:
    """A model of timm with fresh weights: (B, 3, image_size, image_size) to (B, num_classes).

    Args:
        name: with the prefix; see `require_timm`.
        num_classes: size of the last layer.
        image_size: side of the input, for a model that is built for one size.
        drop_path: its rate of stochastic depth; None takes the model's own.

    Raises:
        UserError: for what the model cannot be built with.
    """
    import timm

    own = name.removeprefix(PREFIX)
    options: dict[str, Any] = {}
    pretrained = timm.get_pretrained_cfg(own)
    if pretrained is not None and pretrained.fixed_input_size:
        options["img_size"] = image_size
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    try:
        model: nn.Module = timm.create_model(own, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"model '{name}' cannot be built with {options}: {error}") from error
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"model '{name}' cannot be built for image_size {image_size} and {num_classes} classes: {error}"
        ) from error
    return model
