"""Other last layers than a linear one, for networks that end in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lesam_dist.errors import UserError
from lesam_dist.models.pretrained import last_layer

_PROJECTED = 128


class CosineClassifier(nn.Module):
    """Each logit is s times the cosine between the features and a class's weights, as in LDAM (Cao et al., 2019).

    Input (B, features), output (B, num_classes) in [-s, s]. The weights start with length 1.
    """

    def __init__(self, features: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, features).uniform_(-1, 1), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class View(NamedTuple):
    """What GLMC's loss needs of one view of a batch.

    Attributes:
        logits: of the first classifier, (B, C).
        balanced: of the one that predicts, (B, C).
        projected, predicted: z and p, (B, 128).
    """

    logits: Tensor
    balanced: Tensor
    projected: Tensor
    predicted: Tensor


class TwoViews(nn.Module):
    """GLMC's network (Du et al., 2023): two linear classifiers, a projector and a predictor on the features of one.

    Both views go through the network one after the other within one forward, so that BatchNorm takes each one's own
    statistics, and so that whoever wraps the network (DDP, FSDP2) sees one forward a pass.

    Args:
        features: a network that gives (B, size).
        size: of its features.
        num_classes: of the classifiers.
    """

    def __init__(self, features: nn.Module, size: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.fc = nn.Linear(size, num_classes)
        self.fc_cb = nn.Linear(size, num_classes)
        self.projector = nn.Linear(size, _PROJECTED)
        self.predictor = nn.Linear(_PROJECTED, _PROJECTED)
        for layer in (self.fc, self.fc_cb, self.projector, self.predictor):
            nn.init.kaiming_normal_(layer.weight)  # their biases as torch has them, as in the released code

    def forward(self, images: Tensor, second: Tensor | None = None) -> Tensor | tuple[View, View]:
        """The prediction for images, (B, num_classes); or, of two views of a batch, what the loss needs."""
        if second is None:
            logits: Tensor = self.fc_cb(self.features(images))
            return logits
        return self._view(images), self._view(second)

    def _view(self, images: Tensor) -> View:
        features = self.features(images)
        projected = self.projector(features)
        return View(self.fc(features), self.fc_cb(features), projected, self.predictor(projected))


def without_last_layer(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """The network with its last layer taken out, in place, and the number of features that this layer had.

    Raises:
        UserError: the last layer is not linear.
    """
    path, layer = _linear(model, name)
    model.set_submodule(path, nn.Identity())
    return model, layer.in_features


def replace_last_layer(model: nn.Module, name: str, build: Callable[[int], nn.Module]) -> nn.Module:
    """The network with what ``build(features)`` makes as its last layer, in place.

    Raises:
        UserError: the last layer is not linear.
    """
    path, layer = _linear(model, name)
    model.set_submodule(path, build(layer.in_features))
    return model


def _linear(model: nn.Module, name: str) -> tuple[str, nn.Linear]:
    path = last_layer(model)
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"model '{name}' ends in a {type(layer).__name__} and not in a linear layer, which long_tail.method would "
            "replace: choose another model, or another method."
        )
    return path, layer
