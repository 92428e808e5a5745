"""The training loop: steps, logging, evaluation and checkpoints, on one process or many."""

from __future__ import annotations

import errno
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lesam_dist.data import Loader
from lesam_dist.errors import UserError
from lesam_dist.models import require_model
from lesam_dist.optim import SharpnessAware
from lesam_dist.parallel import Distributed, process_group
from lesam_dist.train import build
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.cli import dump
from lesam_dist.train.config import Config, check_same_run, flatten
from lesam_dist.train.evaluate import evaluate
from lesam_dist.train.passes import BatchPasses, average_batchnorm
from lesam_dist.train.telemetry import METRICS, RunLog, plot_curves
from lesam_dist.wrapping import wrap

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def train(config: Config) -> dict[str, float]:
    """Train as the config says, on the processes that torchrun started or alone.

    Returns:
        The last evaluation: ``acc1`` (per cent), ``loss``, ``samples``.

    Raises:
        UserError: for anything that the user can mend; raised before training where it can be known then.
    """
    require_model(config.model.name)  # before a data set of millions of files is scanned
    with process_group(config.parallel.device) as here:
        _set_precision(config)
        trainer = _dry_trainer(config, here) if config.dry_run else _trainer(config, here)
        try:
            return trainer.fit()
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise UserError(
                f"run_dir '{config.run_dir}' cannot be written: {error}. Checkpoints on disk are whole: make room, "
                "then go on with --resume auto."
            ) from error
        finally:
            trainer.close()


def _trainer(config: Config, here: Distributed) -> Trainer:
    folders = build.build_folders(config, here)
    num_classes = build.resolve_num_classes(config, folders[0].classes)
    loaders = build.build_loaders(config, folders, here)
    model = build.build_network(config, num_classes, here)
    run_dir = _prepare_run_dir(config, here)
    return Trainer(config, here, model, loaders, run_dir, val_samples=len(folders[1].paths))


def _dry_trainer(config: Config, here: Distributed) -> Trainer:
    config.epochs = 1
    config.schedule.lr_warmup_epochs = config.schedule.sigma_warmup_epochs = 0
    config.schedule.anneal_start_epoch = None
    config.logging.every_steps = 1
    num_classes = build.resolve_num_classes(config, None)
    loaders = build.build_synthetic_loaders(config, num_classes, here)
    return Trainer(config, here, build.build_network(config, num_classes, here), loaders, run_dir=None)


class Trainer:
    """One run: owns the model, the optimizer and the loop; the parts are made by `build`.

    Args:
        config: the run.
        here: this process among all.
        model: on the device, equal on every rank, not wrapped.
        loaders: of training and validation images for this rank.
        run_dir: where to write; None writes nothing (a dry run).
        val_samples: number of validation images over all ranks, to check that evaluation counted them all.
    """

    def __init__(
        self,
        config: Config,
        here: Distributed,
        model: nn.Module,
        loaders: tuple[Loader, Loader],
        run_dir: Path | None,
        val_samples: int | None = None,
    ) -> None:
        self.config, self.here, self.run_dir = config, here, run_dir
        self.train_loader, self.val_loader = loaders
        self.val_samples = val_samples
        self.steps_per_epoch = len(self.train_loader)
        self.model = model
        parallel = config.parallel
        self.wrapped = wrap(
            model,
            here,
            parallel.strategy,
            shard_size=parallel.shard_size,
            replicate_size=parallel.replicate_size,
            reshard_after_forward=parallel.reshard_after_forward,
            wrap_classes=parallel.wrap_classes,
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.loss.label_smoothing)
        self.autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision.compute]
        self.scaler = GradScaler(here.device.type) if config.precision.compute == "fp16" else None
        self.optimizer: Optimizer = build.build_optimizer(model, config.optimizer)
        if isinstance(self.optimizer, SharpnessAware):
            self.optimizer.grad_scaler = self.scaler
        self.lr_schedule, self.budget = build.build_schedules(config, self.optimizer, self.steps_per_epoch)
        self.memory_format = torch.channels_last if config.precision.channels_last else torch.contiguous_format
        self.epoch = self.step = 0
        self.last_evaluation: dict[str, float] = {}
        self.checkpoints = (
            None if run_dir is None else Checkpointer(run_dir / "checkpoints", config.checkpoint.keep, here)
        )
        self.log: RunLog | None = None

    def fit(self) -> dict[str, float]:
        """Run from the start, or from the checkpoint that the config resumes, to the last epoch."""
        if self.config.resume is not None:
            self._resume()
        total = self.config.epochs * self.steps_per_epoch
        if self.here.is_main:
            self.log = RunLog(self.run_dir, total, self.step, self.config.logging.tensorboard)
            self.log.print(self._summary())
        while self.epoch < self.config.epochs:
            self._train_epoch()
            average_batchnorm(self.model, self.here)
            self._evaluate()
            last = self.epoch == self.config.epochs
            if self.checkpoints and (last or self.epoch % self.config.checkpoint.every_epochs == 0):
                self.checkpoints.save(self.step, self.model, self.optimizer, self._progress())
        return self.last_evaluation

    def close(self) -> None:
        """Draw the curves, flush the logs, free the loaders; also after an error."""
        self.train_loader.close()
        self.val_loader.close()
        if self.log:
            self.log.close()
            if self.run_dir:
                with suppress(OSError):  # a full disk has been reported by now
                    plot_curves(self.run_dir)
                if self.last_evaluation:
                    top1, samples = self.last_evaluation["acc1"], self.last_evaluation["samples"]
                    self.log.print(f"top-1 {top1:.2f} % of {samples:.0f} validation images after epoch {self.epoch}")
                self.log.print(f"results: {self.run_dir}  (metrics.jsonl, curves.png, checkpoints/, tensorboard/)")
            self.log = None

    def _train_epoch(self) -> None:
        self.wrapped.train()
        # A function of (seed, epoch, rank), so that a resumed epoch draws what the uninterrupted one drew.
        torch.manual_seed((self.config.seed * 100_003 + self.epoch) * 100_003 + self.here.rank)
        meter = _Meter(self.config.data.batch_size)
        batches = self.train_loader.epoch(self.epoch)
        for index in range(self.steps_per_epoch):
            with meter.waiting():
                images, labels = next(batches)
            images = images.to(memory_format=self.memory_format)
            used = self._schedule_values()
            loss = self._step(images, labels)
            self.lr_schedule.step()
            if self.budget:
                self.budget.step()
            self.step += 1
            meter.count()
            if self.log:
                self.log.advance()
            if self.step % self.config.logging.every_steps == 0:
                self._log_step(loss, used, meter, self.epoch + (index + 1) / self.steps_per_epoch)
        self.epoch += 1

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update; returns this rank's loss at the weights before it."""
        micro_batches = self.config.data.micro_batches
        closure = BatchPasses(self.wrapped, self.criterion, images, labels, self.autocast, self.scaler, micro_batches)
        optimizer, scaler = self.optimizer, self.scaler
        if isinstance(optimizer, SharpnessAware):
            loss: Tensor = optimizer.step(closure)
        else:
            optimizer.zero_grad()
            loss = closure()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        return loss

    def _log_step(self, loss: Any, used: dict[str, float], meter: _Meter, epoch: float) -> None:
        scalars: dict[str, Tensor] = {"loss": loss}
        if isinstance(self.optimizer, SharpnessAware):
            telemetry = self.optimizer.telemetry
            scalars |= {k: telemetry[k].to(loss.device) for k in ("perturbed_loss", "grad_norm", "rho", "skipped")}
        means = dict(zip(scalars, self.here.mean(list(scalars.values())), strict=True))
        if self.log:
            self.log.write("train", self.step, epoch, {**means, **used, **meter.rates()})

    def _evaluate(self) -> None:
        result = evaluate(self.model, self.val_loader.epoch(0), self.here, self.autocast)
        if self.val_samples is not None and result["samples"] != self.val_samples:
            raise RuntimeError(f"evaluation counted {result['samples']:.0f} of {self.val_samples} images")
        self.last_evaluation = result
        if self.log:
            self.log.write("val", self.step, self.epoch, result)

    def _schedule_values(self) -> dict[str, float]:
        """The learning rate and the budget of the coming step."""
        values = {"lr": float(self.optimizer.param_groups[0]["lr"])}
        if self.budget:
            values["sigma"] = float(self.budget.get_last_sigma()[0])
        return values

    def _progress(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "lr_schedule": self.lr_schedule.state_dict(),
            "budget": self.budget.state_dict() if self.budget else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "data": self.train_loader.state_dict(),
            "evaluation": self.last_evaluation,
            "config": flatten(self.config),
        }

    def _resume(self) -> None:
        assert self.checkpoints is not None
        progress, damaged = self.checkpoints.load_latest(self.model, self.optimizer)
        if self.here.is_main:
            for fault in damaged:
                print(f"warning: {fault}; going on from an older checkpoint", flush=True)
        if progress is None:
            return
        self.train_loader.load_state_dict(progress["data"])
        self.lr_schedule.load_state_dict(progress["lr_schedule"])
        if self.budget:
            self.budget.load_state_dict(progress["budget"])
        if self.scaler:
            self.scaler.load_state_dict(progress["scaler"])
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.last_evaluation = progress["evaluation"]

    def _summary(self) -> str:
        config, here = self.config, self.here
        params = sum(p.numel() for p in self.model.parameters())
        method = config.optimizer.name
        if isinstance(self.optimizer, SharpnessAware):
            method += f" on {config.optimizer.base}, {config.optimizer.scope} scope"
        processes = f"{here.world_size} x {here.device.type}"
        if here.world_size > 1:
            processes += f", {config.parallel.strategy}"
        start = f", from epoch {self.epoch}" if self.epoch else ""
        return (
            f"{config.model.name} ({params / 1e6:.2f} M parameters), {method}, {config.precision.compute}, "
            f"{processes}, batch {config.data.batch_size}, {config.epochs} epochs of "
            f"{self.steps_per_epoch} steps{start}"
        )


class _Meter:
    """Throughput since the last log line: images per second over all ranks, and the share of time without data."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self) -> _Wait:
        return _Wait(self)

    def count(self) -> None:
        self.steps += 1

    def rates(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.start
        rates = {"images_per_s": self.steps * self.batch_size / elapsed, "data_wait": self.waited / elapsed}
        self._reset()
        return rates


class _Wait:
    def __init__(self, meter: _Meter) -> None:
        self.meter = meter

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.meter.waited += time.perf_counter() - self.since


def _set_precision(config: Config) -> None:
    torch.backends.cuda.matmul.allow_tf32 = config.precision.tf32
    torch.backends.cudnn.allow_tf32 = config.precision.tf32


def _prepare_run_dir(config: Config, here: Distributed) -> Path:
    """Make the run's folder and write config.yaml, on rank 0; never touch another run.

    Raises:
        UserError: the folder holds a run and nothing says to resume it, the resumed run's config differs, or the
            folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    if here.is_main:
        checkpoints = Checkpointer(run_dir / "checkpoints", config.checkpoint.keep, here)
        if config.resume is None and (run_dir / METRICS).exists():
            raise UserError(
                f"run_dir '{run_dir}' already holds a run: go on with --resume auto, or choose another --run_dir."
            )
        saved = checkpoints.progress()
        if saved is not None:
            check_same_run(config, saved["config"])
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(dump(config))
        except OSError as error:
            raise UserError(f"run_dir '{run_dir}' cannot be written: {error.strerror or error}.") from error
    here.barrier()
    return run_dir
