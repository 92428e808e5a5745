"""Projected gradient descent on the pixels of images (Madry et al., 2018), in boxes and balls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lesam_dist.analysis.engine.objective import summed_cross_entropy
from lesam_dist.analysis.engine.randomness import generator

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


def random_starts(norm: Norm, images: Tensor, seed: int, first: int) -> Tensor:
    """A random point of the unit box or ball for each image, in the shape of ``images``.

    Uniform in the box; in the ball a random direction, with a length that is uniform from 0 to 1. Each is a function
    of ``seed``, the norm and the image's index alone.

    Args:
        norm: of the box or the ball.
        images: (B, ...), for shape, dtype and device.
        seed: of all.
        first: index of the first of the images.
    """
    return torch.stack([_start(norm, images.shape[1:], seed, first + i) for i in range(len(images))]).to(images)


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
        starts: from `random_starts`.
        norm: "linf" or "l2".
        eps: radius, in pixels from 0 to 1.
        steps: of the ascent, one forward and one backward each.
        scale: of the images.
    """
    # Rounding leaves pixels a little outside of 0 to 1, where no perturbation, not even zero, would do.
    pixels = scale.pixels(images).clamp_(0, 1)
    lowest, highest = -pixels, 1 - pixels
    delta = (eps * starts).clamp(lowest, highest)
    for _ in range(steps):
        delta.requires_grad_()
        loss = summed_cross_entropy(model(images + scale.normalised(delta)), labels)
        (gradient,) = torch.autograd.grad(loss, delta)
        moved = delta.detach() + eps / STEPS_PER_EPS[norm] * _direction(norm, gradient)
        delta = _projected(norm, moved, eps).clamp(lowest, highest)
    return delta


def _start(norm: Norm, shape: torch.Size, seed: int, index: int) -> Tensor:
    random = generator(seed, f"start in {norm}", index)
    if norm == "linf":
        return 2 * torch.rand(shape, generator=random) - 1
    direction = torch.randn(shape, generator=random)
    length: Tensor = torch.linalg.vector_norm(direction)
    return direction / length * torch.rand((), generator=random)


def _direction(norm: Norm, gradient: Tensor) -> Tensor:
    return gradient.sign() if norm == "linf" else gradient / (_lengths(gradient) + 1e-10)


def _projected(norm: Norm, delta: Tensor, eps: float) -> Tensor:
    if norm == "linf":
        return delta.clamp(-eps, eps)
    tiny = torch.finfo(delta.dtype).tiny
    return delta * (eps / _lengths(delta).clamp_min(tiny)).clamp(max=1)


def _lengths(images: Tensor) -> Tensor:
    """The l_2 norm of each, in a shape that multiplies them."""
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (images.ndim - 1))


def _by_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=images.dtype, device=images.device).view(1, -1, *[1] * (images.ndim - 2))
