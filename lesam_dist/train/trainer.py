"""The training loop: steps, logging, evaluation and checkpoints, on one process or many. `run` sets it up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from lesam_dist.config.learning_rate import peak_lr
from lesam_dist.config.schema import GuardConfig
from lesam_dist.data import Loader
from lesam_dist.errors import PreemptedError, SharedError
from lesam_dist.parallel.batch import Batch
from lesam_dist.parallel.wrapping import wrap
from lesam_dist.tasks.loading import is_built_in
from lesam_dist.tasks.precision import autocast_dtype
from lesam_dist.tasks.task import Task
from lesam_dist.train import build
from lesam_dist.train.batchnorm import average_batchnorm
from lesam_dist.train.boards.board import Outcome
from lesam_dist.train.boards.boards import open_boards
from lesam_dist.train.cadence import Cadence
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.curves import Curves
from lesam_dist.train.divergence import NonFiniteSteps
from lesam_dist.train.ending import draw_and_describe, replay_verdict
from lesam_dist.train.flatness import Flatness, LabelledBatch
from lesam_dist.train.flops import Flops
from lesam_dist.train.formats import in_format
from lesam_dist.train.guard import LossGuard
from lesam_dist.train.input_bound import InputBound
from lesam_dist.train.integrity import ReplicaCheck
from lesam_dist.train.meter import Meter
from lesam_dist.train.opening import describe_longer, describe_settings
from lesam_dist.train.perturbed_samples import samples_per_perturbation
from lesam_dist.train.phases import LOGGING, WAITING, Clock, Phases, event_of
from lesam_dist.train.profiling import profiling
from lesam_dist.train.readings import Readings
from lesam_dist.train.resume_command import Command
from lesam_dist.train.run_dir import RunDir
from lesam_dist.train.run_state import RunState, seed_step
from lesam_dist.train.saves import Saves
from lesam_dist.train.summary import describe_run, shares_of
from lesam_dist.train.telemetry import RunLog
from lesam_dist.train.updates import Updates
from lesam_dist.train.validation import Validation


class Trainer:
    """One run: it owns the model, the optimizer and the loop, and `build` makes its parts.

    Args:
        task: what is learned; its config and world are the run's.
        model: on the device, equal on every rank, not wrapped.
        loaders: of training and validation samples for this rank.
        run_dir: where to write, released by `close`; None writes nothing (a dry run).
        val_samples: number of validation samples over all ranks, to check that evaluation counted them all.
        flops: of the model, to be logged.
        measured: images of `flatness.read_images`, where ``analysis.every_epochs`` asks for it.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        loaders: tuple[Loader, Loader],
        run_dir: RunDir | None,
        val_samples: int | None = None,
        flops: Flops | None = None,
        measured: Sequence[LabelledBatch] | None = None,
    ) -> None:
        config, world = task.config, task.world
        self.task, self.config, self.world, self._claim = task, config, world, run_dir
        self.run_dir = None if run_dir is None else run_dir.path
        self.train_loader, self.val_loader = loaders
        self.steps_per_epoch = len(self.train_loader)
        self.model = model
        parallel = config.parallel
        self.wrapped = wrap(
            model,
            world,
            parallel.strategy,
            shard_size=parallel.shard_size,
            replicate_size=parallel.replicate_size,
            reshard_after_forward=parallel.reshard_after_forward,
            wrap_classes=parallel.wrap_classes,
            scope=config.optimizer.scope,
            gather_dtype=torch.bfloat16 if config.precision.gather_dtype == "bf16" else None,
            reduce_dtype=torch.bfloat16 if parallel.reduce_dtype == "bf16" else None,
        )
        autocast = autocast_dtype(config.precision)
        self.samples = samples_per_perturbation(config, world)
        self.scaler = GradScaler(world.device.type) if config.precision.compute == "fp16" else None
        self.optimizer = build.build_optimizer(model, replace(config.optimizer, lr=peak_lr(config)))
        self.optimizer.grad_scaler = self.scaler
        self.ema = build.build_average(model, config.ema)
        self.lr_schedule, self.budget = build.build_schedules(config, self.optimizer, self.steps_per_epoch)
        self.phases = Phases(world, Clock(event_of(world.device)))
        self.meter = Meter(self.phases.clock, config.data.batch_size, world.world_size, shares_of(config, world), flops)
        self.input_bound = InputBound(config, world)
        self.updates = Updates(
            task,
            self.phases,
            self.meter,
            self.wrapped,
            self.optimizer,
            self.scaler,
            autocast,
            self.steps_per_epoch,
        )
        self.memory_format = torch.channels_last if config.precision.channels_last else torch.contiguous_format
        self.validation = Validation(
            task,
            model,
            self.val_loader,
            world,
            ema=self.ema,
            autocast=autocast,
            memory_format=self.memory_format,
            samples=val_samples,
        )
        self.flatness = None if measured is None else Flatness(model, measured, world, config)
        self.step = 0
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_evaluation: dict[str, float] | None = None  # of the weights after `step` steps
        self.nonfinite = NonFiniteSteps(config, world)
        self.readings = Readings(world, self.optimizer, self.nonfinite, task.bad_files)
        self.guard = LossGuard(GuardConfig() if run_dir is None else config.guard, world)
        self.check = None
        if config.checks.every_steps is not None:
            self.check = ReplicaCheck(model, self.optimizer, self.ema, world, config.optimizer.scope)
        state = RunState(
            config,
            world,
            model,
            self.optimizer,
            self.train_loader,
            self.lr_schedule,
            self.budget,
            self.scaler,
            self.ema,
            self.nonfinite,
            task.metric,
            task.chosen_by,
        )
        self.checkpoints = (
            None if run_dir is None else Checkpointer(run_dir.path / "checkpoints", world, config.checkpoint)
        )
        self.cadence = Cadence(config.checkpoint, config.epochs, self.steps_per_epoch, world)
        self.saves = Saves(self.checkpoints, state, self.guard, self.cadence, self.steps_per_epoch)
        self.log: RunLog | None = None
        self.curves: Curves | None = None  # on rank 0
        self.command: Command | None = None  # that started it, where one did
        self._outcome: Outcome = "failed"  # until it is known

    @property
    def epoch(self) -> int:
        """Epochs that have ended."""
        return self.step // self.steps_per_epoch

    def fit(self) -> dict[str, float]:
        """Run from the start, or from the checkpoint that the config resumes, to the last epoch.

        Raises:
            PreemptedError: it was asked to stop, and has saved what it needs to go on.
        """
        progress = self._load() if self.config.resume is not None else None
        if progress is not None:
            self.guard.load(progress.get("guard") or self.guard.state())
        evaluated = self._is_evaluated()
        if self.world.is_main:
            boards = None if self.run_dir is None else open_boards(self.config, self.run_dir, self.step)
            self.curves = None if self.run_dir is None else Curves(self.run_dir, self.task.metric)
            metric, epochs = self.task.metric, self.config.epochs
            self.log = RunLog(
                self.run_dir, self.total_steps, self.step, boards, evaluated=evaluated, metric=metric, epochs=epochs
            )
            self.log.print(describe_run(self.task, self.model, self.steps_per_epoch, self.step))
            self.log.print(describe_settings(self.task))
            if progress and (then := progress["config"]["epochs"]) != epochs:
                self.log.print(describe_longer(then, epochs, self._schedule_values()))
            if self.check and (remark := self.check.remark()):
                self.log.print(remark)
        if not evaluated:  # it was cut off after its checkpoint
            self._evaluate()
        if self.run_dir and self.step < self.total_steps:
            self.validation.try_out()
            if not is_built_in(self.task):
                self._try_out()
        if self.guard.is_on and self.step == 0:
            self._save(final=False)  # to go back to
        if self.check:
            self.check.compare(self.step, self.checkpoints)
        with profiling(self.config, self.phases, self.run_dir, self.log, self.total_steps - self.step) as after_step:
            for _ in self.steps():
                after_step()
        if self.log and self.config.data.replay:
            self.log.print(replay_verdict(self.meter.steady_images_per_s()))
        if not (self.saves.wait() and self.saves.step == self.step):
            self._save(final=True)  # the disk was full: now or never
        self._require_learning()
        self._outcome = "finished"
        assert self.last_evaluation is not None
        return self.last_evaluation

    def close(self) -> None:
        """Draw the curves, flush the logs, free the loaders; also after an error."""
        self.train_loader.close()
        self.val_loader.close()
        with suppress(Exception):  # after an error, which says more than that its last checkpoint failed too
            self.saves.wait()
        if self.log:
            if self._outcome != "failed":  # else what it did then is what the user is told
                self.world.move("closing its logs")
            seconds = 5.0 if self.world.agreed.stopping else min(20.0, self.config.parallel.timeout_s / 4)
            self.log.close(self._outcome, seconds)
            if self.curves:
                command = self.command if self._outcome == "finished" else None
                stopping = self.world.agreed.stopping
                told = draw_and_describe(self.curves, self.last_evaluation, self.epoch, command, stopping=stopping)
                for line in told:
                    self.log.print(line)
            self.log = None
        if self._claim:
            self._claim.release()

    def steps(self) -> Iterator[int]:
        """Train, one step with all that belongs to it at each turn; gives the number of steps made."""
        while self.step < self.total_steps:
            yield from self._rest_of_epoch()

    def _rest_of_epoch(self) -> Iterator[int]:
        self.wrapped.train()
        self.phases.clock.leave_out()  # evaluations, and what ends an epoch
        epoch, start = divmod(self.step, self.steps_per_epoch)
        batches = self.train_loader.epoch(epoch, start)
        for _ in range(start, self.steps_per_epoch):
            self.phases.begin(WAITING, self.step + 1)
            batch = next(batches)
            self.meter.count_step()
            self._train_step(batch)
            went_back = self._after_step()
            yield self.step
            if went_back:
                return  # to batches that begin elsewhere

    def _try_out(self) -> None:
        """The loss of the batch that comes next, which changes nothing."""
        self.world.move("trying the task's loss")
        self.wrapped.train()
        epoch, start = divmod(self.step, self.steps_per_epoch)
        seed_step(self.config.seed, self.step, self.world.rank)
        self.updates.try_out(self.step, in_format(next(self.train_loader.epoch(epoch, start)), self.memory_format))

    def _train_step(self, batch: Batch) -> None:
        """One update with all that belongs to it; of a batch that is left out, all but the update."""
        seed_step(self.config.seed, self.step, self.world.rank)
        used = self._schedule_values()
        loss = None
        if not self.guard.leaves_out(self.step + 1):
            loss = self._step(in_format(batch, self.memory_format))
            if self.ema:
                self.ema.update(self.optimizer.overflow)
        self.lr_schedule.step()
        if self.budget:
            self.budget.step()
        self.step += 1
        self.last_evaluation = None
        self.phases.begin(LOGGING)
        if self.log:
            self.log.advance()
        if loss is not None:
            self.nonfinite.count(self.step, loss, self.optimizer.telemetry)
            self.guard.observe(self.step, loss, self.optimizer.overflow)
            if self._logs(self.step):
                self._log_step(loss, used)

    def _after_step(self) -> bool:
        """Save and evaluate where that is due. It is saved first: if the evaluation fails, the epoch is not lost. But
        not where the evaluation decides what is averaged.

        Returns:
            Whether the run went back to an earlier step instead.

        Raises:
            PreemptedError: all processes have agreed to stop after this step; it has been saved.
        """
        self.cadence.look_at_clock()
        wish = self.world.agreed.due(self.step)
        saves = wish is not None or self.cadence.is_due(self.step)
        ends_epoch = self.step % self.steps_per_epoch == 0
        went_back = self.guard.verdict(final=saves or ends_epoch) is not None
        if went_back:
            self._roll_back()
        else:
            if ends_epoch:
                average_batchnorm(self.model, self.world)
                if self.ema:
                    self.ema.average_buffers(self.world)
            if self.ema and self.ema.decided_by_evaluation and not self._is_evaluated():
                self._evaluate()
            every = self.config.checks.every_steps
            if self.check and every and (saves or self.step % every == 0):
                self.check.compare(self.step, self.checkpoints, buffers=ends_epoch)
            if saves:
                self._save(final=wish == "stop")
        if wish == "stop":
            raise self._preempted()
        if not self._is_evaluated():
            self._evaluate()
        return went_back

    def _is_evaluated(self) -> bool:
        """Whether what is known of `step` includes its evaluation, if it is one after which an epoch ends."""
        return self.step == 0 or self.step % self.steps_per_epoch != 0 or self.last_evaluation is not None

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, and on from there without the batch that the guard leaves out."""
        if self.log:
            self.log.print(self.guard.remark())
        if (progress := self._load()) is None:
            raise SharedError("there is no checkpoint to go back to: look at RUN_DIR/checkpoints, or start anew.")
        self.guard.load(progress["guard"])
        self.saves.amend({"guard": self.guard.state()})  # what a kill must not make it meet again
        if self.log:
            self.log.go_back(self.step, evaluated=self._is_evaluated())

    def _step(self, batch: Batch) -> Tensor:
        return self.updates.make(self.step, batch, logged=self._logs(self.step + 1))

    def _logs(self, step: int) -> bool:
        return step % self.config.logging.every_steps == 0

    def _log_step(self, loss: Tensor, used: dict[str, float]) -> None:
        reading = self.readings.read(loss, self.meter)
        if self.log:
            self.log.write("train", self.step, self.step / self.steps_per_epoch, reading.values | used)
            warnings = [
                self.readings.rounding(self.step, reading.values),
                self.nonfinite.warning(self.step, reading.nonfinite, reading.in_a_row),
                self.input_bound.warning(self.step, reading.values["data_wait_max"]),
            ]
            for warning in filter(None, warnings):
                self.log.print(warning)
        self.nonfinite.require_few(self.step, reading.in_a_row, self.checkpoints)

    def _require_learning(self) -> None:
        """At the end: a run that diverged shortly before it must not count as finished.

        Before it, a run stops after ``max_nonfinite_steps`` in a row, which may be more than there were left.

        Raises:
            DivergedError: no step of the last half epoch was finite, or the evaluation is not.
        """
        if self.run_dir is None:
            return
        (in_a_row,) = self.world.mean([self.nonfinite.in_a_row])
        if self.scaler is None and in_a_row >= max(1, self.steps_per_epoch / 2):
            raise self.nonfinite.diverged(self.step, in_a_row, self.checkpoints)
        if self.last_evaluation and not math.isfinite(self.last_evaluation["loss"]):
            raise self.nonfinite.diverged(self.step, in_a_row, self.checkpoints)

    def _save(self, *, final: bool) -> None:
        self.saves.save(self.step, self.last_evaluation, final=final)

    def _preempted(self) -> PreemptedError:
        self.saves.wait()
        self._outcome = "stopped"
        reason = self.world.agreed.reason or "a request"
        return PreemptedError(f"stopped by {reason} after step {self.step}: go on with --resume auto.")

    def _evaluate(self) -> None:
        result = self.validation.run(self._is_in_vain)
        if result is None:
            raise self._preempted()
        if self.flatness and self.flatness.is_due(self.epoch):
            result |= self.flatness.measure()
        self.last_evaluation = result
        if self.log:
            self.log.write("val", self.step, self.epoch, result)
            if self.curves and not self.world.agreed.stopping and (warning := self.curves.refresh()):
                self.log.print(warning)
        if self.saves.step == self.step:
            self.saves.amend({"evaluation": result})

    def _is_in_vain(self) -> bool:
        """Whether an evaluation may be left: the run is to stop, and the checkpoint that it is of has been made."""
        return self.world.agreed.stopping and self.saves.step == self.step

    def _schedule_values(self) -> dict[str, float]:
        """The learning rate, the budget and m of the coming step."""
        values = {"lr": float(self.optimizer.param_groups[0]["lr"])}
        if self.budget:
            values["sigma"] = float(self.budget.get_last_sigma()[0])
        if self.samples is not None:
            values["m"] = self.samples
        return values

    def _load(self) -> dict[str, Any] | None:
        """Go to where the newest whole checkpoint is, and return its progress; None where there is none."""
        progress = self.saves.load()
        if progress is not None:
            self.step, self.last_evaluation = progress["step"], progress["evaluation"]
        return progress
