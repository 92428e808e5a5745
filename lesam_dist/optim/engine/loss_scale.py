"""Gradients that stay multiplied by a loss scale: who can works with them as they are, who cannot takes the scale off.

What a step makes of gradients ``S g`` in place of ``g``:

    rho = min(sigma / (||g|| + eps), rho_max) = min(S sigma / (||S g|| + S eps), rho_max)      the same radius
    rho * g / ||g|| = rho * S g / ||S g||                                                     the same direction
    a * g_hat + b * g_kept = (a / S) * S g_hat + b * g_kept                                   the same update

S is a power of two in `GradScaler` as long as its factors are, and then the bits are those of unscaled gradients. A sum
of squares overflows in float32 where a chunk of 16384 elements of S g has a norm of 1.8e19. What came through float16
is at most 65504, of norm 8e6; where nothing was float16, the scale stops growing there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.amp import GradScaler


class LossScale:
    """The scale of one set of gradients. It is on the device alone.

    Attributes:
        of_radius: float64 (3,), what sigma, rho_max and eps are to be multiplied by: S, 1, S.
        inverse: 1/S, float64 0-d.
        is_on: whether the gradients are still multiplied by it.
    """

    def __init__(self, of_radius: Tensor, inverse: Tensor) -> None:
        self.of_radius, self.inverse = of_radius, inverse
        self.is_on = True

    @classmethod
    def of(cls, scaler: GradScaler, ones: Tensor) -> LossScale:
        """The scaler's present one, by scaling ``ones``, float64 (3,). Nothing waits for the device."""
        of_radius = scaler.scale(ones)
        of_radius[1].fill_(1.0)
        return cls(of_radius, of_radius[0].reciprocal())

    def again(self) -> LossScale:
        """That of other gradients in the same step."""
        return LossScale(self.of_radius, self.inverse)

    def take_off(self, gradients: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale, in place.

        Raises:
            ValueError: for one in float16, of which much would round to zero.
        """
        if not self.is_on:
            return
        by_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for g in gradients:
            if g.dtype == torch.float16:
                raise ValueError(
                    "a gradient is float16, and without the loss scale much of it would be zero. Keep the parameters "
                    "in float32 and let autocast choose float16."
                )
            by_place.setdefault((g.device, g.dtype), []).append(g)
        for (device, dtype), tensors in by_place.items():
            torch._foreach_mul_(tensors, self.inverse.to(device, dtype))
        self.is_on = False
