"""Which sharpness to measure; without torch, as the command line's help and errors are made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from lesam_dist.errors import UserError, unknown_name

PARTS = {
    "one_step": "rise of the loss by one step of SAM, and of ASAM",
    "auto_pgd": "largest rise that Auto-PGD finds in balls and ellipsoids around the weights",
    "average": "mean rise under Gaussian noise on the weights",
    "m_sharpness": "rise by SAM's step for several sizes of batch",
    "radius": "radius that a loss budget allows: LE-SAM's first-order rule, and along rays",
}


@dataclass(frozen=True)
class SharpnessPlan:
    """What `sharpness` measures; radii and deviations are in units of the weights.

    Of what has no values nothing is measured.

    Attributes:
        parts: some of `PARTS`.
        batch_size: images of a batch.
        rho: of SAM's step and of Auto-PGD's l2 ball.
        adaptive_rho: of ASAM's step and of the ellipsoid ``||d / |w| ||_2 <= rho``.
        linf_rho: of the box ``|d_i| <= rho``.
        adaptive_linf_rho: of the box ``|d_i| <= rho |w_i|``.
        std: standard deviation of noise on each weight.
        adaptive_std: as a multiple of each weight.
        m_sizes: each m, images of a batch, of m-sharpness; torchrun takes ``--m`` for its own.
        sigma: budgets of the loss.
        steps: of Auto-PGD.
        draws: of noise, for each batch.
        directions: random ones to go along, for each batch.
        max_radius: to go along a ray.
    """

    parts: Sequence[str] = tuple(PARTS)
    batch_size: int = 128
    rho: Sequence[float] = (0.05, 0.1, 0.2)
    adaptive_rho: Sequence[float] = (0.25, 0.5, 1.0)
    linf_rho: Sequence[float] = (0.0001, 0.0002, 0.0004)
    adaptive_linf_rho: Sequence[float] = (0.001, 0.002, 0.004)
    std: Sequence[float] = (0.005, 0.01, 0.02)
    adaptive_std: Sequence[float] = (0.05, 0.1, 0.2)
    m_sizes: Sequence[int] = (16, 64, 256)
    sigma: Sequence[float] = (0.1, 0.3, 1.0)
    steps: int = 20
    draws: int = 10
    directions: int = 3
    max_radius: float = 100.0

    def check(self, samples: int | None = None) -> None:
        """Raise a `UserError` for what cannot be used; ``samples``: number of images, None where it is not known."""
        for part in self.parts:
            if part not in PARTS:
                raise unknown_name("part", part, PARTS)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "parts":
                continue
            least = 0 if field.name == "directions" else None
            for each in value if isinstance(value, Sequence) else (value,):
                if least is None and not 0 < each < math.inf:
                    raise UserError(f"{field.name} is {each:g}: it must be above 0.")
                if least is not None and each < least:
                    raise UserError(f"{field.name} is {each:g}: it must be at least {least}.")
        if samples is None:
            return
        sizes = [("batch_size", self.batch_size)] if set(self.parts) - {"m_sharpness"} else []
        sizes += [("m_sizes", m) for m in self.m_sizes] if "m_sharpness" in self.parts else []
        for name, size in sizes:
            if size > samples:
                raise UserError(
                    f"{name} is {size}, but there are {samples} images: take more of them, or smaller batches."
                )

    def passes(self) -> tuple[int, int]:
        """About how many forwards and backwards it takes; of rays the number depends on the loss."""
        steps = [len(each) for each in (self.rho, self.adaptive_rho) if each]
        balls = sum(map(len, (self.rho, self.adaptive_rho, self.linf_rho, self.adaptive_linf_rho)))
        noises = [len(each) for each in (self.std, self.adaptive_std) if each]
        m_sizes = len(self.m_sizes) if self.rho else 0
        budgets = len(self.sigma)
        of = {
            "one_step": (sum(1 + each for each in steps), len(steps)),
            "auto_pgd": (balls * (self.steps + 1), balls * self.steps),
            "average": (sum(1 + self.draws * each for each in noises), 0),
            "m_sharpness": (m_sizes * (1 + len(self.rho)), m_sizes),
            "radius": (2 + budgets + 14 * (1 + self.directions) * budgets, 2) if budgets else (0, 0),
        }
        chosen = [of[part] for part in PARTS if part in self.parts]
        beside = 1 if set(self.parts) - {"m_sharpness"} else 0  # the loss and its gradient
        return beside + sum(forward for forward, _ in chosen), beside + sum(backward for _, backward in chosen)
