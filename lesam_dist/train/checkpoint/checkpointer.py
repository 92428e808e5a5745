"""What a run does with its checkpoints: save, amend, load the newest whole one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.optim import Optimizer

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import manifest
from lesam_dist.train.checkpoint.background import Background, Staging
from lesam_dist.train.checkpoint.channel import Channel, FailedError, SideChannel
from lesam_dist.train.checkpoint.folder import Folder, name_of
from lesam_dist.train.checkpoint.loading import load_into, verified
from lesam_dist.train.checkpoint.manifest import DamagedError
from lesam_dist.train.checkpoint.planning import Planner
from lesam_dist.train.checkpoint.values import split
from lesam_dist.train.checkpoint.writing import Job, write
from lesam_dist.train.ema import WeightAverage

_WORTH_A_THREAD = 0.01  # of the time


@dataclass(frozen=True)
class Loaded:
    """What `Checkpointer.load_latest` has found.

    Attributes:
        progress: what was saved with it, None where there is no checkpoint at all.
        own: what this rank saved for itself, on the host. Where the number of processes differs: the mean over all that
            saved of what is floating, and the first one's of the rest. Empty for format 1.
        damaged: a line for each damaged checkpoint that was passed over.
    """

    progress: dict[str, Any] | None
    own: dict[str, Tensor] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves and loads a model, its optimizer and the progress of a run; all processes call each method alike.

    Args:
        folder: where the checkpoints lie; made on the first save. On several nodes a shared file system.
        world: this process among all.
        config: which stay on disk, and whether training waits for the disk.
    """

    def __init__(self, folder: Path, world: Distributed, config: CheckpointConfig) -> None:
        self.folder, self.world, self.config = folder, world, config
        self._folder = Folder(folder)
        self._planner, self._staging = Planner(), Staging()
        self._side: SideChannel | None = None
        self._in_flight: tuple[int, Background] | None = None
        self._failed: set[int] = set()
        self._last_failed = False
        self._is_slow, self._last = False, time.monotonic()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        progress: dict[str, Any],
        ema: WeightAverage | None = None,
        *,
        own: Mapping[str, Tensor] | None = None,
        finite: bool = True,
        epoch_end: int | None = None,
        final: bool = False,
    ) -> bool:
        """Write a checkpoint, then remove those that are no longer kept.

        When this returns, everything may change again, also where the writing goes on beside the training. Waits first
        for the one that is still being written. A disk that takes no more is said in a line, by rank 0, and the run
        goes on: the next save tries again.

        Args:
            step: updates made so far; names the checkpoint.
            model, optimizer, ema: what to save.
            progress: must be JSON and equal on all ranks.
            own: tensors of this rank alone, saved for every rank.
            finite: whether the last step and all weights were finite, so that a run can go on from here.
            epoch_end: the number of epochs that have just ended, None in the middle of one.
            final: nothing comes after this one: write it before this returns, or raise.

        Returns:
            Whether it is on disk, or on its way to it; the same on all ranks. Older checkpoints are untouched if not.

        Raises:
            UserError: with ``final`` where it cannot be written; for a value in the state that JSON cannot hold.
            RuntimeError: while the weights are perturbed.
        """
        if getattr(optimizer, "is_perturbed", False):
            raise RuntimeError("the weights are perturbed, and no checkpoint may hold them so: call restore() first.")
        self.wait()
        started = time.monotonic()
        in_thread = not final and (self.config.asynchronous == "always" or self._is_slow)
        if in_thread and self._side is None:
            self._side = SideChannel(self.world)
        channel: Channel = self._side or self.world
        tensors, values = split(_state(model, optimizer, ema))
        share = self._planner.share(tensors, own or {}, channel)
        content = {
            **progress,
            "format": manifest.FORMAT,
            "step": step,
            "finite": finite,
            "epoch_end": epoch_end,
            "torch": torch.__version__,
            "world_size": self.world.world_size,
            "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "values": values,
        }
        copied = self._staging.copy(share.tensors) if in_thread else share.tensors
        job = Job(step, copied, share.index, content)
        if in_thread:
            self._in_flight = step, Background(partial(write, job, self._folder, self.config, channel))
            return True
        failure: FailedError | None = None
        try:
            write(job, self._folder, self.config, channel)
        except FailedError as error:
            failure = error
        self._judge(started)
        return self._report(step, failure, final)

    def wait(self) -> bool:
        """Until the save in flight is on disk, or has failed, which rank 0 says.

        Returns:
            Whether the last save is on disk, whoever waited for it first; True where there was none.
        """
        if self._in_flight is None:
            return not self._last_failed
        step, background = self._in_flight
        self._in_flight = None
        try:
            background.wait()
        except FailedError as error:
            return self._report(step, error)
        return self._report(step)

    def amend(self, step: int, progress: dict[str, Any]) -> None:
        """Add to the progress in a checkpoint, or replace parts of it; nothing where that step could not be written.

        Raises:
            UserError: where somebody else has changed it.
        """
        self.wait()
        checkpoint = self.folder / name_of(step)
        if not self.world.is_main or step in self._failed or not checkpoint.exists():
            return
        try:
            content, files = manifest.read(checkpoint)
            manifest.write(checkpoint, {**content, **progress, "files": files})
            manifest.sync_folder(checkpoint)
        except DamagedError as error:
            raise UserError(f"a checkpoint was changed while the run was writing it: {error}") from error
        except OSError as error:
            reason = error.strerror or error
            print(f"warning: {checkpoint} could not be amended: {reason}. It is as it was.", flush=True)

    def load_latest(self, model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None = None) -> Loaded:
        """Load the newest whole checkpoint into model, optimizer and average, after every file has been verified.

        Raises:
            UserError: where there are checkpoints but none is whole, or it is of another model or a later version.
        """
        self.wait()
        if self.world.is_main:
            self._folder.sweep()
        damaged: list[str] = []
        for name in self.world.share(self._folder.candidates() if self.world.is_main else None):
            try:
                found = verified(self.folder / name, self.world)
            except DamagedError as error:
                damaged.append(str(error))
                continue
            own = load_into(found, _state(model, optimizer, ema), model, optimizer, self.world)
            return Loaded(found.progress, own, damaged)
        if damaged:
            raise SharedError("no checkpoint can be read:\n  " + "\n  ".join(damaged))
        return Loaded(None)

    def exist(self) -> bool:
        """Whether there is any, whole or not."""
        return bool(self._folder.names())

    def last_finite(self) -> Path | None:
        """The newest that was saved as ``finite``; None where there is none."""
        finite = (name for name in self._folder.candidates() if self._folder.is_finite(name))
        return next((self.folder / name for name in finite), None)

    def progress(self) -> dict[str, Any] | None:
        """The progress of the newest checkpoint that looks whole, without reading its data; None where there is none.

        Call it on one rank.

        Raises:
            UserError: that checkpoint is of a later version.
        """
        self.wait()
        for name in self._folder.candidates():
            content = self._folder.content(name)
            if content is not None:
                manifest.format_of(self.folder / name, content)
                return manifest.progress_of(content)
        return None

    def _report(self, step: int, error: FailedError | None = None, final: bool = False) -> bool:
        self._last_failed = error is not None
        if error is None:
            self._failed.discard(step)
            return True
        self._failed.add(step)
        what = f"the checkpoint of step {step} could not be written to {self.folder}: {error}."
        if not error.problem.is_disk:
            raise RuntimeError(what) from error
        if final:
            raise SharedError(
                f"{what} Older checkpoints are untouched: make room, then go on with --resume auto."
            ) from error
        if self.world.is_main:
            rest = "The run goes on, older checkpoints are untouched, and the next save tries again."
            print(f"warning: {what} {rest}", flush=True)
        return False

    def _judge(self, started: float) -> None:
        """Whether the next ones are worth a thread: rank 0 says so for all."""
        now = time.monotonic()
        if self.config.asynchronous == "auto" and not self._is_slow:
            self._is_slow = self.world.share(now - started > _WORTH_A_THREAD * (now - self._last))
        self._last = now


def _state(model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    return state if ema is None else {**state, "ema": ema.state_dict()}
