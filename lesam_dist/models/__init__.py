"""Networks by name: every torchvision classification model, what torchvision lacks, and timm's as ``timm/NAME``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torchvision.models import VisionTransformer

from lesam_dist.errors import UserError, unknown_name
from lesam_dist.models.cifar_resnet import CIFAR_RESNETS, PADDED_RESNETS, cifar_resnet
from lesam_dist.models.drop_path import set_drop_path
from lesam_dist.models.preact_resnet import PreActResNet18
from lesam_dist.models.pretrained import fetch_weights, load_pretrained
from lesam_dist.models.pyramidnet import PyramidNet
from lesam_dist.models.timm_models import PREFIX, build_timm, require_timm
from lesam_dist.models.wide_resnet import WideResNet

__all__ = ["build_model", "fetch_weights", "model_names", "require_input", "require_model"]

# Networks of one size, by number of classes.
_FIXED: dict[str, Callable[..., nn.Module]] = {
    "wide_resnet28_10": lambda num_classes: WideResNet(28, 10, num_classes),
    "preact_resnet18": PreActResNet18,
    "pyramidnet110_270": lambda num_classes: PyramidNet(110, 270, num_classes),
    **PADDED_RESNETS,
}
# Networks of torchvision's classes in sizes that it lacks: ViT-S/16 is DeiT-S's (Touvron et al., 2021).
_SIZES: dict[str, Callable[..., nn.Module]] = {
    "vit_s_16": partial(VisionTransformer, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536),
}


def model_names() -> list[str]:
    """Every name that `build_model` takes, without timm's."""
    return [*CIFAR_RESNETS, *_FIXED, *_SIZES, *torchvision.models.list_models(module=torchvision.models)]


def require_model(name: str) -> None:
    """Raise a UserError unless `build_model` knows this name."""
    if name.startswith(PREFIX):
        require_timm(name)
    elif name not in model_names():
        raise unknown_name("model", name, model_names())


def build_model(
    name: str,
    num_classes: int,
    *,
    image_size: int = 224,
    zero_init_residual: bool = False,
    pretrained: bool = False,
    drop_path: float | None = None,
) -> nn.Module:
    """An image classifier: (B, 3, image_size, image_size) to (B, num_classes).

    Args:
        name: one of `model_names`, or ``timm/NAME``.
        num_classes: size of the last layer.
        image_size: side of the input; only ViTs, and some of timm's models, are built for one size.
        zero_init_residual: start each residual branch at zero (ResNets).
        pretrained: take torchvision's ImageNet weights for all but the last layer, which is freshly initialised, as the
            whole model is otherwise.
        drop_path: rate of stochastic depth, of the last block; None takes the model's own.

    Raises:
        UserError: for an unknown name, an option that this model does not have, or weights that cannot be had.
    """
    require_model(name)
    if name.startswith(PREFIX):
        _refuse_for_timm(name, zero_init_residual, pretrained)
        return build_timm(name, num_classes, image_size, drop_path)
    model = _fresh_model(name, num_classes, image_size, zero_init_residual)
    if drop_path is not None and not set_drop_path(model, drop_path) and drop_path > 0:
        raise UserError(
            f"model.drop_path is {drop_path} but '{name}' has no residual blocks that it is known for: leave it null."
        )
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


def _refuse_for_timm(name: str, zero_init_residual: bool, pretrained: bool) -> None:
    if zero_init_residual:
        raise UserError(f"model '{name}' has no option zero_init_residual, since timm decides; leave it false.")
    if pretrained:
        raise UserError(
            f"model.pretrained is true but timm's weights of '{name}' are not loaded here: set it to false, or take a "
            "model of torchvision's."
        )


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
        make = _SIZES.get(name) or partial(torchvision.models.get_model, name)
        model: nn.Module = make(**options)
    except TypeError as error:
        raise UserError(f"model '{name}' has no option zero_init_residual; leave it false.") from error
    except (ValueError, RuntimeError, AssertionError, MemoryError) as error:
        raise UserError(
            f"model '{name}' cannot be built for image_size {image_size} and {num_classes} classes: {error}"
        ) from error
    return model
