"""torchvision's ImageNet weights under a fresh last layer, for fine-tuning."""

from __future__ import annotations

import os
import pickle
import re
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import GoogLeNet, Inception3

from lesam_dist.errors import UserError

# DenseNet's weights are older than the rule that names of modules have no dots.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def fetch_weights(name: str) -> dict[str, Any]:
    """The state dict of torchvision's weights "DEFAULT" for a model, from torch hub's cache or downloaded into it.

    Only tensors are read: a file in the cache, whose hash nobody checks, can run no code.

    Raises:
        UserError: torchvision has no weights of this model, or they are neither in the cache nor to be had.
    """
    weights = _default_weights(name)
    file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(weights.url)
    remedy = (
        f"put {weights.url} there (the environment variable TORCH_HOME moves the folder), or set model.pretrained to "
        "false."
    )
    was_there = file.exists()
    try:
        state: dict[str, Any] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if was_there:
            raise UserError(
                f"the pretrained weights of '{name}' in '{file}' cannot be read ({_first_line(error)}): remove that "
                f"file and {remedy}"
            ) from error
        raise UserError(
            f"the pretrained weights of '{name}' are not in '{file}' and cannot be downloaded ({_first_line(error)}): "
            f"{remedy}"
        ) from error
    return state


def load_pretrained(model: nn.Module, name: str) -> None:
    """Copy torchvision's weights "DEFAULT" into a model of this name, all but its last layer, which stays as it is.

    Raises:
        UserError: as `fetch_weights`, or the weights are of another network, or for another image size.
    """
    trained = _filled(name, fetch_weights(name))
    if isinstance(model, (GoogLeNet, Inception3)):
        model.transform_input = True  # these two were trained on images normalised in another way
    source, own = trained.state_dict(), model.state_dict()
    head = last_layer(model)
    wanted = {key for key in own if not key.startswith(f"{head}.")}
    wrong = sorted(key for key in wanted if source[key].shape != own[key].shape)
    if wrong:
        side = _default_weights(name).meta["min_size"][0]
        raise UserError(
            f"the pretrained weights of '{name}' do not fit this model ('{wrong[0]}' is {tuple(own[wrong[0]].shape)}, "
            f"there {tuple(source[wrong[0]].shape)}): set data.image_size to {side}, or model.pretrained to false."
        )
    own.update((key, source[key]) for key in wanted)  # in place as well
    model.load_state_dict(own)


def _filled(name: str, state: dict[str, Any]) -> nn.Module:
    """torchvision's own model with these weights; it reads names of parameters that are older than itself."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    trained: nn.Module = torchvision.models.get_model(name, **options)
    for key in list(state):  # in place: the dict has an attribute with the versions of its modules
        state[_OLD_DENSENET.sub(r"\1\2", key)] = state.pop(key)
    try:
        trained.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the pretrained weights of '{name}' in torch hub's cache are those of another network "
            f"({' '.join(str(error).split())[:200]}): remove that file, or set model.pretrained to false."
        ) from error
    return trained


def last_layer(model: nn.Module) -> str:
    """The name of the last module that has parameters of its own: in torchvision's classifiers, the one of classes."""
    name, _ = list(model.named_parameters())[-1]
    return str(name.rpartition(".")[0])


def _default_weights(name: str) -> Any:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(f"model.pretrained is true but torchvision has no weights of '{name}': set it to false.")
    return torchvision.models.get_model_weights(name).DEFAULT


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
