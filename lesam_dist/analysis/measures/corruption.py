"""Accuracy and calibration on corrupted images, those of CIFAR-10-C's files or images corrupted here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lesam_dist.analysis.engine.accuracy import Accuracy, predict
from lesam_dist.analysis.engine.cifar_c import IMAGES, CifarC
from lesam_dist.analysis.engine.corruption import (
    SEVERITIES,
    corrupted,
    kinds_of,
    require_library,
    require_size,
    severities_of,
)
from lesam_dist.analysis.engine.journal import Journal
from lesam_dist.analysis.engine.objective import Batch, Objective
from lesam_dist.analysis.engine.randomness import some_of
from lesam_dist.errors import UserError
from lesam_dist.tasks.classification.calibration import Calibration, calibration_of
from lesam_dist.tasks.classification.pgd import Scale

Batches = Callable[[str, int], Iterator[Batch]]
"""This process's normalised images of a kind and severity."""


@dataclass(frozen=True)
class Cell:
    """What was found for one kind of corruption at one severity."""

    kind: str
    severity: int
    accuracy: Accuracy
    calibration: Calibration

    @property
    def error(self) -> float:
        """The share of images that are classified wrongly, in per cent."""
        return 100 - self.accuracy.percent

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        where = {"kind": self.kind, "severity": self.severity, "error": self.error}
        return where | self.accuracy.numbers() | {"nll": self.calibration.nll, "ece": self.calibration.ece}


@dataclass(frozen=True)
class Corrupted:
    """What was found on corrupted images.

    Attributes:
        images: which, as `Corruptions.images`.
        cells: by kind, and for each by severity.
    """

    images: str
    cells: list[Cell]

    @property
    def mean_error(self) -> float:
        """The mean over all kinds and severities, in per cent: an mCE that no other network's errors normalise."""
        return fmean(cell.error for cell in self.cells)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        kinds = dict.fromkeys(cell.kind for cell in self.cells)
        means = {kind: fmean(cell.error for cell in self.cells if cell.kind == kind) for kind in kinds}
        return {
            "images": self.images,
            "mean_error": self.mean_error,
            "normalised_by_alexnet": False,
            "mean_nll": fmean(cell.calibration.nll for cell in self.cells),
            "mean_ece": fmean(cell.calibration.ece for cell in self.cells),
            "kinds": [{"kind": kind, "mean_error": mean} for kind, mean in means.items()],
            "cells": [cell.numbers() for cell in self.cells],
        }


class Corruptions:
    """Kinds at severities, of images that are corrupted here, or of CIFAR-C's files.

    Args:
        names: of kinds, or "all".
        severities: from 1 to 5.
        root: folder of the files; None corrupts images here.

    Attributes:
        kinds, severities: each once, in order.
        cells: pairs of them, in the order in which they are measured.
        images: where they come from, a text that differs for others.

    Raises:
        UserError: there is no such kind or severity; a file is missing or wrong; without files, the package is missing.
    """

    def __init__(self, names: Sequence[str], severities: Sequence[int], root: Path | str | None) -> None:
        self.kinds, self.severities = kinds_of(names), severities_of(severities)
        self.cells = [(kind, severity) for kind in self.kinds for severity in self.severities]
        self._files = None if root is None else CifarC(Path(root).expanduser(), self.kinds)
        self.images = require_library() if self._files is None else f"CIFAR-C {self._files.digest}"

    def of(self, objective: Objective, scale: Scale, seed: int) -> Batches:
        """How the batches of a cell are made; nothing is computed before they are asked for.

        Raises:
            UserError: images are too small, or not RGB; labels are not the model's.
        """
        shape = tuple(objective.batches[0][0].shape[1:])
        if len(shape) != 3 or shape[0] != 3:
            raise UserError(f"images have the shape {shape}: corruptions are of RGB images, (3, height, width).")
        if self._files is not None:
            return _read(self._files, objective, scale, seed)
        require_size(*shape[1:])
        return _generated(objective, scale, seed)

    def measure(
        self, objective: Objective, batches: Batches, journal: Journal, on_forwards: Callable[[int], None]
    ) -> Corrupted:
        """One forward and one all-reduce for each cell."""
        found = []
        for kind, severity in self.cells:
            kept = journal.get(f"{kind} {severity}", lambda: predict(objective, batches(kind, severity)))  # noqa: B023 (called at once)
            sums = torch.tensor(kept, dtype=torch.float64)
            accuracy = Accuracy(round(float(sums[2].sum())), round(float(sums[0].sum())))
            found.append(Cell(kind, severity, accuracy, calibration_of(sums)))
            on_forwards(len(found))
        return Corrupted(self.images, found)


def corruptions_of(
    names: Sequence[str], severities: Sequence[int] | None, root: Path | str | None
) -> Corruptions | None:
    """What `robustness` is asked for by these arguments: nothing, unless there is a name or a folder, of which all are.

    Raises:
        UserError: as `Corruptions`.
    """
    if not names and root is None:
        return None
    return Corruptions(names or "all", SEVERITIES if severities is None else severities, root)


def _generated(objective: Objective, scale: Scale, seed: int) -> Batches:
    world = objective.world
    first = sum(world.gather(sum(len(labels) for _, labels in objective.batches))[: world.rank])

    def batches(kind: str, severity: int) -> Iterator[Batch]:
        index = first
        for images, labels in objective.batches:
            world.move(f"corrupting images: {kind}")
            pixels = (255 * scale.pixels(images)).round().clamp(0, 255).to(torch.uint8)
            rows = pixels.permute(0, 2, 3, 1).cpu().numpy()
            made = np.stack([corrupted(row, kind, severity, seed, index + i) for i, row in enumerate(rows)])
            index += len(labels)
            yield _normalised(made, scale, images), labels

    return batches


def _read(files: CifarC, objective: Objective, scale: Scale, seed: int) -> Batches:
    images = objective.batches[0][0]
    with objective.computing(), torch.no_grad():
        files.require_classes(objective.model(images[:1]).shape[1])
    world, size = objective.world, max(len(labels) for _, labels in objective.batches)
    share = np.array_split(some_of(IMAGES, objective.samples, seed, train=False), world.world_size)[world.rank]

    def batches(kind: str, severity: int) -> Iterator[Batch]:
        for begin in range(0, len(share), size):
            pixels, labels = files.batch(kind, severity, share[begin : begin + size])
            yield _normalised(pixels, scale, images), torch.from_numpy(labels).to(images.device)

    return batches


def _normalised(pixels: np.ndarray[Any, np.dtype[np.uint8]], scale: Scale, like: Tensor) -> Tensor:
    """(B, H, W, 3) as the model takes images: (B, 3, H', W'), in the size, the dtype and on the device of ``like``.

    Another size is made as CIFAR's images are made larger for a model that needs it.
    """
    out = scale.images(torch.from_numpy(pixels).to(like.device).permute(0, 3, 1, 2).to(like.dtype) / 255)
    if out.shape[2:] != like.shape[2:]:
        out = F.interpolate(out, size=tuple(like.shape[2:]), mode="bilinear", antialias=True)
    return out.contiguous()
