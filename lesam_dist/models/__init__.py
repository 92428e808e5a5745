"""Networks by name: every torchvision classification model, and what torchvision lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from torch.func import functional_call

from lesam_dist.errors import UserError, unknown_name
from lesam_dist.models.cifar_resnet import CIFAR_RESNETS, cifar_resnet
from lesam_dist.models.pretrained import fetch_weights, load_pretrained
from lesam_dist.models.pyramidnet import PyramidNet
from lesam_dist.models.wide_resnet import WideResNet

__all__ = ["build_model", "fetch_weights", "model_names", "require_input", "require_model"]

# Networks of one size, by number of classes.
_FIXED: dict[str, Callable[..., nn.Module]] = {
    "wide_resnet28_10": lambda num_classes: WideResNet(28, 10, num_classes),
    "pyramidnet110_270": lambda num_classes: PyramidNet(110, 270, num_classes),
}


def model_names() -> list[str]:
    """Every name that `build_model` takes."""
    return [*CIFAR_RESNETS, *_FIXED, *torchvision.models.list_models(module=torchvision.models)]


def require_model(name: str) -> None:
    """Raise a UserError unless `build_model` knows this name."""
    if name not in model_names():
        raise unknown_name("model", name, model_names())


def build_model(
    name: str, num_classes: int, *, image_size: int = 224, zero_init_residual: bool = False, pretrained: bool = False
) -> nn.Module:
    """An image classifier: (B, 3, image_size, image_size) to (B, num_classes).

    Args:
        name: one of `model_names`.
        num_classes: size of the last layer.
        image_size: side of the input; only ViTs are built for one size.
        zero_init_residual: start each residual branch at zero (ResNets).
        pretrained: take torchvision's ImageNet weights for all but the last layer, which is freshly initialised, as the
            whole model is otherwise.

    Raises:
        UserError: for an unknown name, an option that this model does not have, or weights that cannot be had.
    """
    require_model(name)
    model = _fresh_model(name, num_classes, image_size, zero_init_residual)
    if pretrained:
        load_pretrained(model, name)
    return model


@torch.no_grad()
def require_input(
    model: nn.Module, name: str, batch_size: int, image_size: int, field: str = "data.image_size"
) -> None:
    """Raise a UserError unless the model can be trained on images (batch_size, 3, image_size, image_size) at once.

    Sizes alone go through it, on the meta device: nothing is computed, and its buffers stay as they are. ``field`` of
    the config is what asks for this image size.
    """
    state = {key: t.to("meta") for key, t in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
    try:
        functional_call(model, state, (images,))
    except NotImplementedError:  # an operation that has no form without data
        return
    except (ValueError, RuntimeError, AssertionError) as error:
        remedy = "set a larger data.image_size, or choose a model for small images (cifar_resnet...)"
        if field != "data.image_size":
            remedy = f"change {field}, which asks for that size; models like ViTs are made for data.image_size alone"
        if "more than 1 value per channel" in str(error):
            remedy = (
                "BatchNorm needs more than one image in each part of a batch that a process takes at once: raise "
                f"data.batch_size, or lower data.micro_batches or the number of processes. Or {remedy}"
            )
        images_of = "1 image" if batch_size == 1 else f"{batch_size} images"
        raise UserError(
            f"model '{name}' cannot be trained on {images_of} of {image_size} x {image_size} pixels at once "
            f"({str(error).splitlines()[0]}): {remedy}."
        ) from error


def _fresh_model(name: str, num_classes: int, image_size: int, zero_init_residual: bool) -> nn.Module:
    options: dict[str, Any] = {"num_classes": num_classes}
    if zero_init_residual:
        options["zero_init_residual"] = True
    if name.startswith("vit_"):
        options["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads return tuples in training; a trainer of one loss has no use for them.
        options |= {"aux_logits": False, "init_weights": True}
    try:
        if name in CIFAR_RESNETS:
            return cifar_resnet(CIFAR_RESNETS[name], num_classes, zero_init_residual)
        if name in _FIXED:
            return _FIXED[name](**options)
        model: nn.Module = torchvision.models.get_model(name, **options)
    except TypeError as error:
        raise UserError(f"model '{name}' has no option zero_init_residual; leave it false.") from error
    except (ValueError, RuntimeError, AssertionError, MemoryError) as error:
        raise UserError(
            f"model '{name}' cannot be built for image_size {image_size} and {num_classes} classes: {error}"
        ) from error
    return model
