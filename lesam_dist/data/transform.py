"""What happens to an image between its file and the model, and everything that is random in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lesam_dist.data.auto_augment import Policy, policy_of
from lesam_dist.data.color_jitter import COLOR_NUMBERS, Amounts, choose
from lesam_dist.data.erasing import NUMBERS, holes
from lesam_dist.data.order import AUGMENT_STREAM, COLOR_STREAM, CROP_STREAM, ERASING_STREAM, position_uniforms
from lesam_dist.errors import UserError

ATTEMPTS = 10  # candidate crops per image, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Transform:
    """Training: random crop, resized to a square, flipped at random. Evaluation: resize, centre crop.

    Both are torchvision's: ``RandomResizedCrop`` + ``RandomHorizontalFlip``, and ``Resize`` + ``CenterCrop``,
    bilinear with antialiasing; EXIF orientation is ignored, as ``ImageFolder`` does. Or, in evaluation,
    ``Resize((side, side))`` alone, which changes the aspect and shows the whole image. Then
    ``(pixel / 255 - mean) / std`` per channel.

    With DALI (measured on the CPU) pixels are within one grey level of 255 of that, by rounding; the
    outermost pixels of an image or of a training crop may differ by a few more, as DALI's antialiasing filter
    repeats the last row where Pillow's leaves it out. An image too thin for any candidate crop gets the
    largest within the aspect bounds at a random place, where torchvision takes the centre.

    Attributes:
        image_size: side of the square that the model sees, in pixels.
        val_resize: evaluation resizes the short side to this many pixels before the centre crop.
        val_crop: side of that crop, in pixels; None takes ``image_size``.
        val_keep_aspect: false resizes all of the image to that side instead.
        random_area: range of the crop's area, as a fraction of the image's.
        random_aspect_ratio: range of the crop's width / height.
        horizontal_flip: mirror every second training image, on average.
        auto_augment: "none", "randaugment" or "trivialaugment", see `lesam_dist.data.auto_augment`.
        randaugment_ops: operations on each image.
        randaugment_magnitude: how strong each is, 0 to 30.
        color_jitter: how much brightness, contrast, saturation and hue change, see `lesam_dist.data.color_jitter`.
        grayscale: share of the training images that become grey.
        random_erasing: share of the training images of which a rectangle is erased, see `lesam_dist.data.erasing`.
        sizes: ``(epoch, side)`` pairs with rising epochs, the first of them 0: from each such epoch on the side of the
            training images, in pixels; None takes ``image_size`` in all.
        mean: of each RGB channel, on the 0..1 scale.
        std: likewise.
    """

    image_size: int = 224
    val_resize: int = 256
    val_crop: int | None = None
    val_keep_aspect: bool = True
    random_area: tuple[float, float] = (0.08, 1.0)
    random_aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: bool = True
    auto_augment: str = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    color_jitter: Amounts = (0.0, 0.0, 0.0, 0.0)
    grayscale: float = 0.0
    random_erasing: float = 0.0
    sizes: tuple[tuple[int, int], ...] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}: it must be at least 1 pixel.")
        if self.val_keep_aspect and self.val_resize < self.val_side:
            name = "image_size" if self.val_crop is None else "val_crop"
            raise UserError(
                f"val_resize ({self.val_resize}) is smaller than {name} ({self.val_side}): the centre "
                f"crop would not fit, so set val_resize to at least {self.val_side}."
            )
        low, high = self.random_area
        if not 0 < low <= high <= 1:
            raise UserError(f"random_area is {self.random_area}: it needs 0 < low <= high <= 1.")
        low, high = self.random_aspect_ratio
        if not 0 < low <= high:
            raise UserError(f"random_aspect_ratio is {self.random_aspect_ratio}: it needs 0 < low <= high.")
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std}: every channel's must be positive.")

    @property
    def policy(self) -> Policy | None:
        """How the operations on a training image are chosen; None for none."""
        if self.auto_augment == "none":
            return None
        return policy_of(self.auto_augment, self.randaugment_ops, self.randaugment_magnitude)

    @property
    def changes_color(self) -> bool:
        """Whether colours of training images are changed, other than by the policy."""
        return any(self.color_jitter) or self.grayscale > 0

    @property
    def val_side(self) -> int:
        """Side of the images in evaluation, in pixels."""
        return self.image_size if self.val_crop is None else self.val_crop

    def side(self, epoch: int) -> int:
        """Side of the training images in an epoch, in pixels."""
        begun = [side for first, side in self.sizes or () if first <= epoch]
        return begun[-1] if begun else self.image_size


class Draws(NamedTuple):
    """The random numbers of a batch of B training images; they do not know the images' sizes.

    Attributes:
        area: float64 ``(B, ATTEMPTS)``, candidate crop areas as fractions of the image.
        ratio: float64 ``(B, ATTEMPTS)``, candidate width / height, uniform in the logarithm.
        position: float64 ``(B, 2)`` in [0, 1), where the crop lies: (down, across).
        flip: int32 ``(B,)``, 1 to mirror.
        side: int32 ``(B,)``, of the image that is made, in pixels; not random, and the same for the whole epoch.
        operation: int32 ``(B, K)``, what is done to colours and shape, one after the other; see `OPERATIONS`.
        level: int32 ``(B, K)``, how, see `Policy`.
        color: int32 ``(B, K)``, what is done to the colours after that, see `color_jitter.choose`.
        factor: float32 ``(B, K)``, by how much.
        gray: int32 ``(B,)``, 1 for an image that becomes grey then.
        hole: int64 ``(B, 4)``, the rectangle that is erased: top, left, height, width in pixels; 0 0 0 0 for none.
    """

    area: NDArray[np.float64]
    ratio: NDArray[np.float64]
    position: NDArray[np.float64]
    flip: NDArray[np.int32]
    side: NDArray[np.int32]
    operation: NDArray[np.int32]
    level: NDArray[np.int32]
    color: NDArray[np.int32]
    factor: NDArray[np.float32]
    gray: NDArray[np.int32]
    hole: NDArray[np.int64]

    def take(self, some: Sequence[int]) -> Draws:
        """Those of some of the images."""
        parts: Any = [numbers[some] for numbers in self]
        return Draws(*parts)


def draw(transform: Transform, positions: range, *, seed: int, epoch: int) -> Draws:
    """Random numbers of the samples at ``positions`` of an epoch; see `position_uniforms`.

    What an option draws comes from a stream of its own, so that it changes nothing in the others.
    """
    of_epoch = partial(position_uniforms, positions=positions, seed=seed, epoch=epoch)
    side, policy = transform.side(epoch), transform.policy
    no_operations = np.zeros((len(positions), 0), dtype=np.int32)
    operation, level = no_operations, no_operations
    if policy is not None:
        operation, level = policy.choose(of_epoch(AUGMENT_STREAM, policy.numbers))
    color, factor, gray = no_operations, no_operations.astype(np.float32), np.zeros(len(positions), dtype=np.int32)
    if transform.changes_color:
        color, factor, gray = choose(of_epoch(COLOR_STREAM, COLOR_NUMBERS), transform.color_jitter, transform.grayscale)
    hole = np.zeros((len(positions), 4), dtype=np.int64)
    if transform.random_erasing:
        hole = holes(of_epoch(ERASING_STREAM, NUMBERS), transform.random_erasing, side)
    uniform = of_epoch(CROP_STREAM, 2 * ATTEMPTS + 3)
    low, high = transform.random_area
    log_low, log_high = np.log(transform.random_aspect_ratio)
    return Draws(
        area=low + (high - low) * uniform[:, :ATTEMPTS],
        ratio=np.exp(log_low + (log_high - log_low) * uniform[:, ATTEMPTS:-3]),
        position=np.ascontiguousarray(uniform[:, -3:-1]),
        flip=(uniform[:, -1] < 0.5).astype(np.int32) * np.int32(transform.horizontal_flip),
        side=np.full(len(positions), side, dtype=np.int32),
        operation=operation,
        level=level,
        color=color,
        factor=factor,
        gray=gray,
        hole=hole,
    )


def crop_window(
    height: int,
    width: int,
    area: NDArray[np.float64],
    ratio: NDArray[np.float64],
    position: NDArray[np.float64],
    ratio_bounds: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop ``(top, left, height, width)`` of one image, in pixels: RandomResizedCrop without the dice.

    A candidate of area s (a fraction) and aspect r has sides ``w = sqrt(s r H W)``, ``h = sqrt(s H W / r)``.
    With a = W / H it fits into the image (w <= W, h <= H) iff ``s r <= a`` and ``s a <= r``. The first that
    fits is taken; if none does, as in a panorama, the largest crop with an aspect within bounds.
    This is the readable form of the graph in ``dali_graph.py``: same operations in float64, same pixels.
    """
    a = width / height
    fits = np.flatnonzero((area * ratio <= a) & (area * a <= ratio))
    if fits.size:
        s, r = float(area[fits[0]]), float(ratio[fits[0]])
    else:
        r = min(max(a, ratio_bounds[0]), ratio_bounds[1])
        s = min(a / r, r / a)
    pixels = s * (height * width)
    # A side of a very thin image can round to 0 or past the edge.
    w = min(max(math.floor(math.sqrt(pixels * r) + 0.5), 1), width)
    h = min(max(math.floor(math.sqrt(pixels / r) + 0.5), 1), height)
    top = math.floor(float(position[0]) * (height - h + 1))
    left = math.floor(float(position[1]) * (width - w + 1))
    return top, left, h, w
