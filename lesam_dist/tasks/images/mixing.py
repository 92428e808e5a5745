"""Mixup and CutMix: each image of a batch with another one, and the targets likewise.

Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) draw a share l from Beta(alpha, alpha) in each step. Of two
images a, b with targets t_a, t_b:

    mixup    l a + (1 - l) b
    CutMix   a, but b's pixels in a rectangle of 1 - l of the area, around a uniform centre, cut off at the edges;
             l then becomes the share that is left of a
    both     l t_a + (1 - l) t_b

Whether a step mixes, by which of both, l and the rectangle are a function of (seed, step), the same for all images and
on all processes. Partners are neighbours, images 2i and 2i + 1 of the global batch, which a shuffled batch makes random
ones. So the global batch is the same on any number of processes, where each has an even number of images.

The batch is mixed once in a step, before any pass: both passes of a sharpness-aware step see the same one, and so do
their parts (micro-batches, a share of the samples, the samples that a method selects).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lesam_dist.config.schema import Config, DataConfig
from lesam_dist.data.order import MIXING_STREAM, generator_of
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed


class Mix(NamedTuple):
    """What a step does to its batch.

    Attributes:
        share: of each image that stays, 0 to 1.
        box: rows and columns ``(top, bottom, left, right)`` that come from the partner; None mixes all pixels.
    """

    share: float
    box: tuple[int, int, int, int] | None


def draw_mix(data: DataConfig, height: int, width: int, *, seed: int, step: int) -> Mix | None:
    """How a step mixes images of this size; None where it does not."""
    if not (data.mixup or data.cutmix):
        return None
    generator = generator_of(MIXING_STREAM, seed=seed, index=step)
    applies, which, down, across = generator.random(4).tolist()
    if applies >= data.mix_probability:
        return None
    cuts = which < 0.5 if data.mixup and data.cutmix else data.cutmix > 0
    alpha = data.cutmix if cuts else data.mixup
    share = float(generator.beta(alpha, alpha))
    if not cuts:
        return Mix(share, None)
    half = 0.5 * math.sqrt(1 - share)
    centre_row, centre_column = int(down * height), int(across * width)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(centre_row - half_height, 0), min(centre_row + half_height, height)
    left, right = max(centre_column - half_width, 0), min(centre_column + half_width, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix(images: Tensor, labels: Tensor, num_classes: int, how: Mix) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour.

    Args:
        images: (B, C, H, W) with an even B; they stay as they are, and so does their memory format.
        labels: (B,) int64.

    Returns:
        New images, and float32 targets (B, num_classes).
    """
    partner = torch.arange(len(labels), device=labels.device) ^ 1
    others = images[partner]
    if how.box is None:
        mixed = torch.lerp(others, images, how.share)
    else:
        top, bottom, left, right = how.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    targets = F.one_hot(labels, num_classes).float()
    return mixed, torch.lerp(targets[partner], targets, how.share)


class Mixing:
    """Mixes the batches of a run, as its config says.

    Args:
        config: the run.
        num_classes: of the targets.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        self._data, self._seed, self._num_classes = config.data, config.seed, num_classes

    def __call__(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of step number ``step``, from 0; what went in where the step does not mix."""
        how = draw_mix(self._data, images.shape[-2], images.shape[-1], seed=self._seed, step=step)
        return (images, labels) if how is None else mix(images, labels, self._num_classes, how)


def require_pairs(config: Config, world: Distributed) -> None:
    """Refuse to mix where a process would have an image without a partner.

    Raises:
        UserError: with the numbers.
    """
    data, share = config.data, config.data.batch_size // world.world_size
    if (data.mixup or data.cutmix) and share % 2:
        raise UserError(
            f"data.mixup and data.cutmix mix images in pairs, but each process takes {share} of a batch of "
            f"{data.batch_size}: choose a data.batch_size that is a multiple of {2 * world.world_size}."
        )
