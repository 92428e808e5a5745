"""Image classification: cross entropy of logits, of mixed or attacked images where the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from lesam_dist.config.adversarial_checks import attack_steps
from lesam_dist.parallel.batch import Batch
from lesam_dist.tasks.classification.adversarial import Attack
from lesam_dist.tasks.classification.loss import ClassificationLoss
from lesam_dist.tasks.classification.metrics import ClassifierMetrics
from lesam_dist.tasks.images.mixing import Mixing
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.task import At, Metric

ACC1 = Metric("acc1", "top-1", "%", samples="images")


class Classification(ImageTask):
    """Images ``(B, 3, S, S)`` and labels ``(B,)``; the targets of mixed images are ``(B, K)``."""

    metric: ClassVar[Metric] = ACC1
    _metrics: ClassVar[ClassifierMetrics] = ClassifierMetrics()

    @cached_property
    def _mixing(self) -> Mixing | None:
        data = self.config.data
        return Mixing(self.config, self.num_classes) if data.mixup or data.cutmix else None

    @cached_property
    def _criteria(self) -> tuple[ClassificationLoss, ClassificationLoss]:
        """The mean over a batch, and the loss of each sample."""
        return ClassificationLoss(self.config.loss), ClassificationLoss(self.config.loss, "none")

    @cached_property
    def _attack(self) -> Attack | None:
        return None if self.config.adversarial.norm is None else Attack(self.config, self.world)

    @property
    def draw_passes(self) -> tuple[float, float]:
        steps = attack_steps(self.config)
        return steps, steps / 2  # the backward leaves the weights out, which is half of it

    def build_model(self) -> nn.Module:
        self._network = super().build_model()  # placed and sharded in place, and wrapped by DDP from outside
        return self._network

    def draw(self, batch: Batch, at: At) -> Batch:
        if self._attack is not None:
            images, labels = batch
            return self._attack.on_training(self._network, images, labels, at.step), labels
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
        sums = self._metrics.measure(model, batch)
        if self._attack is not None and self.config.adversarial.evaluate:
            images, labels = batch
            logits = model(self._attack.on_evaluation(model, images, labels))
            sums["robust_acc1"] = (logits.argmax(dim=1) == labels).sum()
        return sums

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return self._metrics.report(sums)
