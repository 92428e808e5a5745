"""Projected gradient descent on the pixels of images (Madry et al., 2018), in boxes and balls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["linf", "l2"]
STEPS_PER_EPS: dict[Norm, int] = {"linf": 4, "l2": 8}
"""A step is eps over this."""


@dataclass(frozen=True)
class Scale:
    """How images were normalised: ``(pixels - mean) / std`` by channel, for pixels from 0 to 1.

    Attributes:
        mean, std: one for each channel, which is dimension 1, or one for all.
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def pixels(self, images: Tensor) -> Tensor:
        """Of normalised images."""
        return images * _by_channel(self.std, images) + _by_channel(self.mean, images)

    def images(self, pixels: Tensor) -> Tensor:
        """Normalised, of pixels."""
        return (pixels - _by_channel(self.mean, pixels)) / _by_channel(self.std, pixels)

    def normalised(self, delta: Tensor) -> Tensor:
        """A difference of pixels as the difference of normalised images that it makes."""
        return delta / _by_channel(self.std, delta)


@torch.enable_grad()
def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    starts: Tensor,
    *,
    norm: Norm,
    eps: float,
    steps: int,
    scale: Scale,
    step_size: float | None = None,
) -> Tensor:
    """Perturbations that raise the cross entropy, in pixels, in the shape of ``images``.

    As the evaluation of Zhang et al., "On the Duality Between Sharpness-Aware Minimization and Adversarial Training"
    (ICML 2024; eval.py of their code), which Section 6.3 of the paper follows: steps of eps/4 along the sign of the
    gradient (l_inf), or of eps/8 along the gradient divided by its norm + 1e-10 (l_2); after each the perturbation is
    projected on the ball, and then clipped so that pixels stay from 0 to 1, as it is at the start. The last iterate
    counts. The loss is the sum over the images, not their mean, so that the gradient of one does not depend on how many
    are beside it.

    Args:
        model: gives logits; in eval mode.
        images: normalised, (B, ...).
        labels: (B,).
        starts: points of the unit box or ball, in the shape of ``images``; zeros begin at the images.
        norm: "linf" or "l2".
        eps: radius, in pixels from 0 to 1.
        steps: of the ascent, one forward and one backward each.
        scale: of the images.
        step_size: of a step, in pixels; None takes the above.
    """
    std = _by_channel(scale.std, images)
    size = eps / STEPS_PER_EPS[norm] if step_size is None else step_size
    # Rounding leaves pixels a little outside of 0 to 1, where no perturbation, not even zero, would do.
    pixels = scale.pixels(images).clamp_(0, 1)
    lowest, highest = -pixels, 1 - pixels
    delta = (eps * starts).clamp(lowest, highest)
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(model(images + delta / std), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        moved = delta.detach() + size * _direction(norm, gradient)
        delta = _projected(norm, moved, eps).clamp(lowest, highest)
    return delta


def _direction(norm: Norm, gradient: Tensor) -> Tensor:
    return gradient.sign() if norm == "linf" else gradient / (_lengths(gradient) + 1e-10)


def _projected(norm: Norm, delta: Tensor, eps: float) -> Tensor:
    if norm == "linf":
        return delta.clamp(-eps, eps)
    tiny = torch.finfo(delta.dtype).tiny
    return delta * (eps / _lengths(delta).clamp_min(tiny)).clamp(max=1)


def _lengths(images: Tensor) -> Tensor:
    """The l_2 norm of each, in a shape that multiplies them."""
    # Not vector_norm, whose last bits depend on the address: what is attacked is trained on.
    lengths = images.flatten(1).square().sum(dim=1).sqrt()
    return lengths.view(-1, *[1] * (images.ndim - 1))


def _by_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=images.dtype, device=images.device).view(1, -1, *[1] * (images.ndim - 2))
