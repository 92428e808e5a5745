"""One update of a run: mixing, the batch's passes, the method where it works, and what a skipped step undoes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from lesam_dist.config.schema import Config
from lesam_dist.optim import SharpnessAware
from lesam_dist.optim.plain import Plain
from lesam_dist.train.buffers import ModelBuffers
from lesam_dist.train.loss import ClassificationLoss
from lesam_dist.train.meter import Meter
from lesam_dist.train.mixing import Mixing
from lesam_dist.train.passes import BatchPasses
from lesam_dist.train.phases import Phases


class Updates:
    """Makes the updates of a run.

    Args:
        config: the run.
        phases: told of each pass.
        meter: told how many images it took.
        model: in training mode, wrapped or not.
        optimizer: of that model; knows the scaler.
        scaler, autocast: as `BatchPasses` has them.
        steps_per_epoch: of the run.
        num_classes: of the targets.
    """

    def __init__(
        self,
        config: Config,
        phases: Phases,
        meter: Meter,
        model: nn.Module,
        optimizer: SharpnessAware,
        scaler: GradScaler | None,
        autocast: torch.dtype | None,
        steps_per_epoch: int,
        num_classes: int,
    ) -> None:
        self._config, self._model, self._optimizer = config, model, optimizer
        self._phases, self._meter = phases, meter
        self._scaler, self._autocast, self._steps_per_epoch = scaler, autocast, steps_per_epoch
        self._buffers = ModelBuffers(model)
        self._mixing = Mixing(config, num_classes)
        self.criterion: nn.Module = ClassificationLoss(config.loss)

    def make(self, step: int, images: Tensor, labels: Tensor, *, logged: bool) -> Tensor:
        """Update number ``step``, from 0.

        Args:
            images: (B, C, H, W) on the device.
            labels: (B,) int64.
            logged: whether the telemetry of this step is read.

        Returns:
            This rank's loss at the weights before it, 0-d.
        """
        optimizer = self._optimizer
        optimizer.enabled = self._method_works(step)
        rounds = self._config.precision.weights != "fp32" and not isinstance(optimizer, Plain)
        optimizer.measure_rho = rounds and logged
        self._buffers.save()
        closures = self._closures(*self._mixing(step, images, labels))
        loss: Tensor = optimizer.step(closures if len(closures) > 1 else closures[0])
        for passes in closures:
            self._meter.count_images(passes.forwards, passes.backwards)
        self._buffers.undo_if(optimizer.overflow)
        if self._scaler is not None:
            self._scaler.update()
        return loss

    def _closures(self, images: Tensor, targets: Tensor) -> list[BatchPasses]:
        """The batch as one closure with one perturbation, or each micro-batch as a closure with its own."""
        data = self._config.data
        if data.accumulation_mode == "batch":
            return [self._passes(images, targets, data.micro_batches)]
        parts = zip(images.chunk(data.micro_batches), targets.chunk(data.micro_batches), strict=True)
        return [self._passes(*part) for part in parts]

    def _passes(self, images: Tensor, targets: Tensor, micro_batches: int = 1) -> BatchPasses:
        return BatchPasses(
            self._model,
            self.criterion,
            images,
            targets,
            self._autocast,
            self._scaler,
            micro_batches,
            on_pass=self._phases.begin,
            may_round=lambda: self._optimizer.descends,
        )

    def _method_works(self, step: int) -> bool:
        """Whether a step lies in the epochs in which the method works."""
        start, stop = self._config.optimizer.start_epoch, self._config.optimizer.stop_epoch
        epoch = step / self._steps_per_epoch
        return start <= epoch and (stop is None or epoch < stop)
