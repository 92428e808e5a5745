"""Image classification: cross entropy of logits, with mixed images where the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.classification.loss import ClassificationLoss
from lesam_dist.tasks.classification.metrics import ClassifierMetrics
from lesam_dist.tasks.images.mixing import Mixing
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.task import At, Metric

ACC1 = Metric("acc1", "top-1", "%")


class Classification(ImageTask):
    """Images ``(B, 3, S, S)`` and labels ``(B,)``; the targets of mixed images are ``(B, K)``."""

    metric: ClassVar[Metric] = ACC1

    @cached_property
    def _mixing(self) -> Mixing | None:
        data = self.config.data
        return Mixing(self.config, self.num_classes) if data.mixup or data.cutmix else None

    @cached_property
    def _criteria(self) -> tuple[ClassificationLoss, ClassificationLoss]:
        """The mean over a batch, and the loss of each sample."""
        return ClassificationLoss(self.config.loss), ClassificationLoss(self.config.loss, "none")

    @cached_property
    def _metrics(self) -> ClassifierMetrics:
        return ClassifierMetrics()

    def draw(self, batch: Batch, at: At) -> Batch:
        return batch if self._mixing is None else self._mixing(at.step, *batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        value: Tensor = self._criteria[0](model(images), targets)
        return value

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        images, targets = batch
        values: Tensor = self._criteria[1](model(images), targets)
        return values

    def measure(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor | float]:
        return self._metrics.measure(model, batch)

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return self._metrics.report(sums)
