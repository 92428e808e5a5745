"""Networks by name: every torchvision classification model, and what torchvision lacks."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from lesam_dist.errors import UserError, unknown_name
from lesam_dist.models.cifar_resnet import CIFAR_RESNETS, cifar_resnet

__all__ = ["build_model", "model_names", "require_model"]


def model_names() -> list[str]:
    """Every name that `build_model` takes."""
    return [*CIFAR_RESNETS, *torchvision.models.list_models(module=torchvision.models)]


def require_model(name: str) -> None:
    """Raise a UserError unless `build_model` knows this name."""
    if name not in model_names():
        raise unknown_name("model", name, model_names())


def build_model(name: str, num_classes: int, *, image_size: int = 224, zero_init_residual: bool = False) -> nn.Module:
    """A freshly initialised image classifier: (B, 3, image_size, image_size) to (B, num_classes).

    Args:
        name: one of `model_names`.
        num_classes: size of the last layer.
        image_size: side of the input; only ViTs are built for one size.
        zero_init_residual: start each residual branch at zero (ResNets).

    Raises:
        UserError: for an unknown name, or an option that this model does not have.
    """
    require_model(name)
    if name in CIFAR_RESNETS:
        return cifar_resnet(CIFAR_RESNETS[name], num_classes, zero_init_residual)
    options: dict[str, Any] = {"num_classes": num_classes}
    if zero_init_residual:
        options["zero_init_residual"] = True
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return tuples in training; a trainer of one loss has no use for them.
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model: nn.Module = torchvision.models.get_model(name, **options)
    except TypeError as error:
        raise UserError(f"model '{name}' has no option zero_init_residual; leave it false.") from error
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"model '{name}' cannot be built for image_size {image_size}: {error}") from error
    return model
