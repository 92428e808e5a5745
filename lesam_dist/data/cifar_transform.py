"""What happens to a batch of 32 x 32 images on the device, and everything that is random in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lesam_dist.data.order import CIFAR_STREAM, position_uniforms
from lesam_dist.errors import UserError

SIDE = 32  # pixels
DRAWS = 6  # random numbers of one image


@dataclass(frozen=True)
class CifarTransform:
    """Training: random crop of the zero-padded image, random flip, normalisation, Cutout. Evaluation: normalisation.

    These are torchvision's ``RandomCrop(32, padding)``, ``RandomHorizontalFlip``, ``ToTensor`` and ``Normalize``, then
    Cutout as in DeVries and Taylor (2017): a square of zeros, so of the mean colour, whose centre is uniform over the
    pixels and of which a part may lie outside. The code of SAM and ESAM for CIFAR has it with side 16 and probability
    0.5, the authors of Cutout with side 16 (CIFAR-10) or 8 (CIFAR-100) and probability 1.

    Attributes:
        image_size: the batch is resized to this side at the end (bilinear), for models of larger images; 32 leaves it.
        crop_padding: rows and columns of black pixels on each side, of which the crop may show that many.
        horizontal_flip: mirror every second training image, on average.
        cutout: side of the square in pixels; 0 for none.
        cutout_probability: share of the training images that get one.
        mean: of each RGB channel, on the 0..1 scale.
        std: likewise.
    """

    image_size: int = SIDE
    crop_padding: int = 4
    horizontal_flip: bool = True
    cutout: int = 0
    cutout_probability: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}: it must be at least 1 pixel.")
        if not 0 <= self.crop_padding < SIDE:
            raise UserError(
                f"crop_padding is {self.crop_padding}: it must be at least 0 and less than the image, {SIDE} pixels."
            )
        if not 0 <= self.cutout <= SIDE:
            raise UserError(f"cutout is {self.cutout}: it must be at least 0 and at most the image, {SIDE} pixels.")
        if not 0 <= self.cutout_probability <= 1:
            raise UserError(f"cutout_probability is {self.cutout_probability}: it must be in [0, 1].")
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std}: every channel's must be positive.")


class CifarDraws(NamedTuple):
    """The random numbers of a batch of B training images, each int64 ``(B,)``.

    Attributes:
        top: first row of the crop in the padded image, 0 .. 2 * crop_padding.
        left: first column.
        flip: 1 to mirror.
        hole_top: first row of the square that is cut out; negative where it begins above the image, and below the image
            (32) where there is none.
        hole_left: first column.
    """

    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip: NDArray[np.int64]
    hole_top: NDArray[np.int64]
    hole_left: NDArray[np.int64]


def draw(transform: CifarTransform, positions: range, *, seed: int, epoch: int) -> CifarDraws:
    """Random numbers of the samples at ``positions`` of an epoch; see `position_uniforms`."""
    return draws_of(transform, position_uniforms(CIFAR_STREAM, DRAWS, positions, seed=seed, epoch=epoch).T)


def draws_of(transform: CifarTransform, u: NDArray[np.float64]) -> CifarDraws:
    """What uniform numbers make of a batch.

    An option has its own row, so that it changes nothing in the others.

    Args:
        transform: the ranges.
        u: ``(DRAWS, B)``, in [0, 1).
    """
    top, left = (u[:2] * (2 * transform.crop_padding + 1)).astype(np.int64)
    flip = (u[2] < 0.5).astype(np.int64) * transform.horizontal_flip
    hole_top, hole_left = (u[3:5] * SIDE).astype(np.int64) - transform.cutout // 2
    return CifarDraws(top, left, flip, np.where(u[5] < transform.cutout_probability, hole_top, SIDE), hole_left)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Cut each image, padded with zeros, to its old size at its own place, and mirror some.

    Args:
        images: uint8 ``(B, C, S, S)``.
        top, left: int64 ``(B,)``, where the crop starts in the padded image, 0 .. 2 * padding.
        flip: int64 ``(B,)``, not 0 to mirror.
        padding: rows and columns on each side.

    Returns:
        uint8 ``(B, C, S, S)``: one gather, since a loop over images would be B launches on a GPU.
    """
    batch, channels, side, _ = images.shape
    padded = F.pad(images, (padding,) * 4).flatten(2)
    position = torch.arange(side, device=images.device)
    rows = top[:, None] + position
    columns = left[:, None] + torch.where(flip[:, None] != 0, side - 1 - position, position)
    pixels = rows[:, :, None] * (side + 2 * padding) + columns[:, None, :]
    return padded.gather(2, pixels.view(batch, 1, -1).expand(-1, channels, -1)).view_as(images)


def cut_out(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """Set a square of each image to zero, in place; what lies outside the image is ignored.

    Args:
        images: ``(B, C, S, S)``.
        top, left: int64 ``(B,)``, the first row and column of the square, of any sign.
        side: of the square, in pixels.
    """
    position = torch.arange(images.shape[-1], device=images.device)
    rows, columns = ((position >= first[:, None]) & (position < first[:, None] + side) for first in (top, left))
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
