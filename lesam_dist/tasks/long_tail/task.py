"""Long-tailed classification: a training set whose classes become ever smaller, evaluated on all classes alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lesam_dist.config.schema import LongTailMethod
from lesam_dist.data import ImageFolder, Loader
from lesam_dist.data.cifar import CifarSplit
from lesam_dist.data.cifar_transform import SIDE
from lesam_dist.data.in_memory import in_memory
from lesam_dist.data.long_tail import class_counts, long_tailed, long_tailed_counts
from lesam_dist.data.pairs import PairLoader
from lesam_dist.errors import UserError
from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.classification.metrics import ClassifierMetrics
from lesam_dist.tasks.classification.task import ACC1
from lesam_dist.tasks.images.data import Images, build_evaluation_loader, device_transform
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.long_tail.cross_entropy import CrossEntropy
from lesam_dist.tasks.long_tail.glmc import Glmc
from lesam_dist.tasks.long_tail.groups import group_accuracies, groups_of
from lesam_dist.tasks.long_tail.ldam_drw import LdamDrw
from lesam_dist.tasks.long_tail.logit_adjustment import LogitAdjustment
from lesam_dist.tasks.long_tail.method import Method
from lesam_dist.tasks.task import At, Metric

METHODS: dict[LongTailMethod, type[Method]] = {
    "cross_entropy": CrossEntropy,
    "ldam_drw": LdamDrw,
    "logit_adjustment": LogitAdjustment,
    "glmc": Glmc,
}
_DRY_LARGEST = 500  # images of the first class where there are no data


class LongTail(ImageTask):
    """The images of ``config.data``, of which training sees the part that ``config.long_tail`` says.

    Validation images are all there. Built-in data stay on the device, 32 x 32 pixels large, as CIFAR does.
    """

    metric: ClassVar[Metric] = ACC1
    _metrics: ClassVar[ClassifierMetrics] = ClassifierMetrics()

    def open_data(self) -> tuple[Images, Images]:
        train, val = super().open_data()
        part = long_tailed(train, self.config.long_tail.imbalance_factor, self.config.long_tail.subset)
        return (_kept(part), _kept(val)) if self.config.on_device else (part, val)

    @cached_property
    def counts(self) -> Tensor:
        """Training images of each class, (C,) int64 on the device; in a dry run what they might be.

        Raises:
            UserError: the model has more classes than the data.
        """
        if self.config.dry_run:
            factor = self.config.long_tail.imbalance_factor
            counts = np.array(long_tailed_counts(max(_DRY_LARGEST, int(factor) + 1), self.num_classes, factor))
        else:
            counts = class_counts(np.asarray(self.splits[0].labels), self.num_classes)
        if not counts.all():
            raise UserError(
                f"model.num_classes is {self.num_classes} but the data have {int((counts > 0).sum())} classes, and the "
                "loss of a class without training images is not defined: leave it null."
            )
        return torch.from_numpy(counts).to(self.world.device)

    @cached_property
    def _method(self) -> Method:
        return METHODS[self.config.long_tail.method](self.config.long_tail, self.counts, self.config.seed)

    def loaders(self) -> tuple[Loader, Loader]:
        train, val = self.splits
        if self.world.is_main:
            print(_described(self.counts), flush=True)
        if self.config.long_tail.method != "glmc":
            return super().loaders()
        assert isinstance(train, CifarSplit), "refused by check_long_tail"
        return self._pairs(train), build_evaluation_loader(self.config, val, self.world)

    def dry_loaders(self) -> tuple[Loader, Loader]:
        train, val = super().dry_loaders()
        if self.config.long_tail.method != "glmc":
            return train, val
        labels = np.arange(max(2 * self.config.data.batch_size, self.num_classes)) % self.num_classes
        shape = (len(labels), 3, SIDE, SIDE)
        images = np.random.default_rng(self.config.seed).integers(0, 256, shape, dtype=np.uint8)
        return self._pairs(CifarSplit(Path("random"), tuple(map(str, range(self.num_classes))), images, labels)), val

    def _pairs(self, split: CifarSplit) -> PairLoader:
        return PairLoader(
            split,
            transform=device_transform(self.config),
            batch_size=self.config.data.batch_size,
            seed=self.config.seed,
            rank=self.world.rank,
            world_size=self.world.world_size,
            device=self.world.device,
            resample=self.config.long_tail.resample,
        )

    def build_model(self) -> nn.Module:
        return self._method.network(super().build_model(), self.config.model.name, self.num_classes)

    def draw(self, batch: Batch, at: At) -> Batch:
        return self._method.draw(batch, at)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._method.losses(model, batch).mean()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._method.losses(model, batch)

    def count(self, batch: Batch) -> int | Tensor:
        return self._method.count(batch)

    @property
    def counts_samples(self) -> bool:
        return type(self._method).count is Method.count

    def measure(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor | float]:
        images, labels = batch
        logits = model(images)
        right = labels[logits.argmax(dim=1) == labels]
        of_class = {
            name: torch.bincount(of, minlength=self.num_classes)
            for name, of in (("class_right", right), ("class_samples", labels))
        }
        return self._metrics.of_logits(logits, labels) | of_class

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """As classification, and the mean class accuracy of "many", "medium" and "few", in per cent."""
        groups = group_accuracies(sums["class_right"], sums["class_samples"], self.counts.cpu())
        return self._metrics.report(sums) | groups


def _kept(split: Images) -> CifarSplit:
    return in_memory(split) if isinstance(split, ImageFolder) else split


def _described(counts: Tensor) -> str:
    sizes = ", ".join(f"{int(group.sum())} {name}" for name, group in groups_of(counts).items())
    return (
        f"long_tail: {int(counts.sum())} training images, {int(counts.max())} to {int(counts.min())} of a class; "
        f"classes: {sizes}"
    )
