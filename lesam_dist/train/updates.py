"""One update of a run: what the task draws, the batch's passes, the method where it works, and what a skipped step
undoes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from lesam_dist.errors import UserError
from lesam_dist.optim import SharpnessAware
from lesam_dist.optim.plain import Plain
from lesam_dist.parallel.batch import Batch, parts, samples_in
from lesam_dist.tasks.guarded import guarded
from lesam_dist.tasks.task import At, Task
from lesam_dist.train.buffers import ModelBuffers
from lesam_dist.train.meter import Meter
from lesam_dist.train.passes import Passes, uncompiled
from lesam_dist.train.phases import DRAWING, Phases


class Updates:
    """Makes the updates of a run.

    Args:
        task: what is learned; its config and world are the run's.
        phases: told of each pass.
        meter: told how many images it took.
        model: in training mode, wrapped or not.
        optimizer: of that model; knows the scaler.
        scaler, autocast: as `Passes` has them.
        steps_per_epoch: of the run.
    """

    def __init__(
        self,
        task: Task,
        phases: Phases,
        meter: Meter,
        model: nn.Module,
        optimizer: SharpnessAware,
        scaler: GradScaler | None,
        autocast: torch.dtype | None,
        steps_per_epoch: int,
    ) -> None:
        self._task, self._config, self._model, self._optimizer = task, task.config, model, optimizer
        self._phases, self._meter = phases, meter
        self._scaler, self._autocast, self._steps_per_epoch = scaler, autocast, steps_per_epoch
        self._buffers = ModelBuffers(model)
        # Asked again, a model that FSDP2 has gathered names the gathered parameters.
        whole = model.module if isinstance(model, DistributedDataParallel) else model
        self._parameters: dict[str, nn.Parameter] = dict(whole.named_parameters())
        self._resting: list[nn.Parameter] = []
        self._loss, self._losses = guarded(task), guarded(task, per_sample=True)
        self._weighs = task.world.world_size > 1 and not task.counts_samples

    def make(self, step: int, batch: Batch, *, logged: bool) -> Tensor:
        """Update number ``step``, from 0.

        Args:
            batch: of this process, on the device, as the loader gives it.
            logged: whether the telemetry of this step is read.

        Returns:
            This rank's loss at the weights before it, 0-d, such that the mean over ranks is the batch's.
        """
        optimizer = self._optimizer
        optimizer.enabled = self._method_works(step)
        rounds = self._config.precision.weights != "fp32" and not isinstance(optimizer, Plain)
        optimizer.measure_rho = rounds and logged
        self._buffers.save()
        self._resting = [self._parameters[name] for name in self._task.resting(self._parameters, self._at(step))]
        if self._resting and not optimizer.state:
            self._create_state()
        closures = self._closures(self._drawn(batch, step))
        loss: Tensor = optimizer.step(closures if len(closures) > 1 else closures[0])
        for passes in closures:
            self._meter.count_images(passes.forwards, passes.backwards)
        self._buffers.undo_if(optimizer.overflow)
        if self._scaler is not None:
            self._scaler.update()
        return loss

    def _drawn(self, batch: Batch, step: int) -> Batch:
        forwards, backwards = self._task.draw_passes
        if forwards or backwards:
            self._phases.begin(DRAWING)
            samples = samples_in(batch)
            self._meter.count_images(forwards * samples, backwards * samples)
        return self._task.draw(batch, self._at(step))

    def try_out(self, step: int, batch: Batch) -> None:
        """Compute the loss of a batch, which changes nothing: what is broken shows before anything is written.

        Raises:
            UserError: as `guarded`; the loss is not finite.
        """
        self._buffers.save()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), uncompiled(self._model):
            drawn = self._task.draw(batch, self._at(step))
            with torch.autocast(self._task.world.device.type, self._autocast, enabled=self._autocast is not None):
                loss = self._loss(self._model, drawn)
        self._buffers.undo_if(torch.ones(()))
        if not loss.isfinite():
            raise UserError(
                f"the task {type(self._task).__name__}: loss(model, batch) is {loss.item()} for the first batch, "
                "before any update: look at what build_model and the loaders give."
            )

    def _create_state(self) -> None:
        """The optimizer's, of all parameters: a checkpoint holds that of those too that have rested so far."""
        for p in self._parameters.values():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        self._optimizer.step(None)
        self._optimizer.zero_grad()

    def _at(self, step: int) -> At:
        return At(step, self._steps_per_epoch, self._config.epochs)

    def _closures(self, batch: Batch) -> list[Passes]:
        """The batch as one closure with one perturbation, or each micro-batch as a closure with its own."""
        data = self._config.data
        if data.accumulation_mode == "batch":
            return [self._passes(batch, data.micro_batches)]
        return [self._passes(part) for part in parts(batch, data.micro_batches)]

    def _passes(self, batch: Batch, micro_batches: int = 1) -> Passes:
        return Passes(
            self._model,
            self._loss,
            batch,
            self._autocast,
            self._scaler,
            micro_batches,
            on_pass=self._phases.begin,
            may_round=lambda: self._optimizer.descends,
            losses=self._losses,
            count=self._task.count,
            share=self._share(batch),
            resting=self._resting,
        )

    def _share(self, batch: Batch) -> Tensor | float:
        """What this process's mean counts for in the mean of all: 1, but where a task counts other things than
        samples."""
        if not self._weighs:
            return 1.0
        world = self._task.world
        own = torch.as_tensor(self._task.count(batch), dtype=torch.float64, device=world.device)
        total = own.clone()
        dist.all_reduce(total)
        return (own * world.world_size / total).float()

    def _method_works(self, step: int) -> bool:
        """Whether a step lies in the epochs in which the method works."""
        start, stop = self._config.optimizer.start_epoch, self._config.optimizer.stop_epoch
        epoch = step / self._steps_per_epoch
        return start <= epoch and (stop is None or epoch < stop)
