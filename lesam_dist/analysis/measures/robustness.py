"""Accuracy under attacks on the pixels (Table 5 of the paper) and corruptions, and whether to trust the confidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lesam_dist.analysis.engine.accuracy import Accuracy, predict
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Objective
from lesam_dist.analysis.engine.starts import random_starts
from lesam_dist.analysis.measures.corruption import Corrupted, corruptions_of
from lesam_dist.errors import UserError
from lesam_dist.tasks.classification.calibration import (
    Calibration,
    calibration_of,
    over_processes,
    right,
)
from lesam_dist.tasks.classification.pgd import Norm, Scale, pgd

_HALF_A_GREY_LEVEL = 0.5 / 255


@dataclass(frozen=True)
class Robustness:
    """What `robustness` has found.

    Attributes:
        clean: of the images as they are.
        attacked: by norm and eps.
        calibration: of the predictions for the images as they are.
        corrupted: of corrupted images; None where there were none.
    """

    clean: Accuracy
    attacked: dict[tuple[Norm, float], Accuracy]
    calibration: Calibration
    corrupted: Corrupted | None = None

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        attacked = [{"norm": norm, "eps": eps} | found.numbers() for (norm, eps), found in self.attacked.items()]
        found = {"clean": self.clean.numbers(), "attacked": attacked, "calibration": asdict(self.calibration)}
        return found if self.corrupted is None else found | {"corrupted": self.corrupted.numbers()}


def robustness(
    objective: Objective,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    linf: Sequence[float] = (1 / 255,),
    l2: Sequence[float] = (32 / 255,),
    steps: int = 10,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] | None = None,
    corruptions_root: Path | str | None = None,
    seed: int = 0,
    journal: Journal | None = None,
    on_passes: Callable[[float], None] | None = None,
) -> Robustness:
    """Accuracy under PGD (`lesam_dist.tasks.classification.pgd.pgd`) and corruptions; NLL and ECE, clean and corrupted.

    The default attacks are those of the paper's Table 5. Each image has one random start in each norm, which depends on
    ``seed`` and on the image's index among those of all processes, rank 0's first: neither the number of processes nor
    the size of batches changes an attack, beyond rounding. An eps of 0 changes nothing. The weights stay, and so do
    the images. One forward for the clean images; ``steps`` + 1 forwards and ``steps`` backwards for each eps.

    This accuracy is no lower than the one under the worst perturbation, which no attack is sure to find, least of all
    where the loss is so near to 0 that its gradient vanishes.

    ``corruptions`` are off, for what they cost: one forward for each kind and severity, and making the images. They are
    of the same images, as `lesam_dist.analysis.engine.corruption` makes them after all resizing, in whole grey levels;
    what is random in them depends on ``seed``, kind, severity and the image's index. Or they are read from the files of
    CIFAR-10-C or CIFAR-100-C: as many of the 10,000 test images as there are images here, the same at all severities
    (those of a run that `load` has chosen from CIFAR's validation images by the same seed).

    Args:
        objective: has the model, which gives logits, and the images, (B, ...) with channels in dimension 1, normalised
            as ``(pixels - mean) / std`` for pixels from 0 to 1. Its criterion is not used.
        mean, std: by channel, or one for all; of a run: ``source.config.data.mean`` and ``std`` of its `Subject`.
        linf, l2: radii eps in that norm, in pixels from 0 to 1: 8/255 is eight grey levels.
        steps: of PGD, each of eps/4 (l_inf) or eps/8 (l_2).
        corruptions: kinds, of `lesam_dist.analysis.engine.corruption.KINDS`, or "all", which a folder alone stands for.
        severities: of each, from 1 to 5; None takes all.
        corruptions_root: folder of ``labels.npy`` and a ``KIND.npy`` for each; None makes them of the images.
        seed: of the starts and the corruptions.
        journal: keeps what each eps has found, for the next try; None keeps nothing.
        on_passes: called with the number of passes so far.

    Raises:
        UserError: for a number out of range; for images whose pixels are not from 0 to 1, as with another mean; for
            corruptions that there are not, or that cannot be made or read.
    """
    check(linf, l2, steps)
    asked = corruptions_of(corruptions, severities, corruptions_root)
    scale = Scale(mean, std)
    _require_pixels(objective, scale)
    batches = None if asked is None else asked.of(objective, scale, seed)
    kept = Journal() if journal is None else journal  # an empty one is false
    made = 1.0
    sums = torch.tensor(kept.get("clean", lambda: predict(objective, objective.batches)), dtype=torch.float64)
    attacked: dict[tuple[Norm, float], Accuracy] = {}

    def advance(share: float) -> None:
        if on_passes:
            on_passes(made + share * (2 * steps + 1))

    advance(0)
    radii: list[tuple[Norm, float]] = [*(("linf", eps) for eps in linf), *(("l2", eps) for eps in l2)]
    for norm, eps in radii:
        found = kept.get(f"{norm} {eps!r}", lambda: _attacked(objective, scale, norm, eps, steps, seed, advance))  # noqa: B023 (called at once)
        attacked[norm, eps] = Accuracy(found, objective.samples)
        made += 2 * steps + 1
        advance(0)
    corrupted = None
    if asked is not None and batches is not None:
        corrupted = asked.measure(objective, batches, kept, lambda done: on_passes(made + done) if on_passes else None)
    clean = Accuracy(round(float(sums[2].sum())), objective.samples)
    return Robustness(clean, attacked, calibration_of(sums), corrupted)


def check(linf: Sequence[float], l2: Sequence[float], steps: int) -> None:
    """Raise a `UserError` for a number that `robustness` cannot use."""
    for name, radii, largest in (("linf", linf, 1.0), ("l2", l2, math.inf)):
        for eps in radii:
            if not (0 <= eps <= largest and math.isfinite(eps)):
                limit = "from 0 to 1" if largest == 1 else "finite and at least 0"
                raise UserError(
                    f"{name} is {eps:g}: it must be {limit}, for pixels from 0 to 1; eight grey levels are 8/255."
                )
    if steps < 1:
        raise UserError(f"steps is {steps}: it must be at least 1.")


def passes(linf: Sequence[float], l2: Sequence[float], steps: int, cells: int = 0) -> tuple[int, int]:
    """Forwards and backwards that `robustness` makes, with so many pairs of a corruption and a severity."""
    radii = len(linf) + len(l2)
    return 1 + radii * (steps + 1) + cells, radii * steps


def _attacked(
    objective: Objective,
    scale: Scale,
    norm: Norm,
    eps: float,
    steps: int,
    seed: int,
    advance: Callable[[float], None],
) -> int:
    """How many images are still classified rightly."""
    world = objective.world
    shares = world.gather(sum(len(labels) for _, labels in objective.batches))
    begin = first = sum(shares[: world.rank])
    count = torch.zeros((), dtype=torch.long, device=objective.device)
    for images, labels in objective.batches:
        starts = random_starts(norm, images, seed, first)
        with objective.computing():
            delta = pgd(objective.model, images, labels, starts, norm=norm, eps=eps, steps=steps, scale=scale)
            with torch.no_grad():
                count += right(objective.model(images + scale.normalised(delta)), labels).sum()
        first += len(labels)
        advance((first - begin) / shares[world.rank])
    objective.passes["forward"] += steps + 1
    objective.passes["backward"] += steps
    return int(over_processes(count, world))


def _require_pixels(objective: Objective, scale: Scale) -> None:
    """On all processes alike: images that were not normalised so would be attacked on a scale that nobody knows."""
    ends = [scale.pixels(images).aminmax() for images, _ in objective.batches if images.numel()]
    here = min(float(end.min) for end in ends), max(float(end.max) for end in ends)
    lowest, highest = (
        pick(each) for pick, each in zip((min, max), zip(*objective.world.gather(here), strict=True), strict=True)
    )
    if not (lowest >= -_HALF_A_GREY_LEVEL and highest <= 1 + _HALF_A_GREY_LEVEL):
        raise UserError(
            f"pixels are from {lowest:.3g} to {highest:.3g} once mean and std are undone, and should be from 0 to 1: "
            "give the mean and std that the images were normalised with."
        )
