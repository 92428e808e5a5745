"""What a run needs, beside its model, optimizer and average, to go on after any step as if it had not stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR

from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.data import Loader
from lesam_dist.errors import SharedError
from lesam_dist.optim import CosineBudget, SharpnessAware
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.tasks.task import Metric
from lesam_dist.train.divergence import NonFiniteSteps
from lesam_dist.train.ema import WeightAverage


@dataclass
class RunState:
    """The parts of a run whose state is not in its weights.

    Some of it is equal on all processes and is the checkpoint's `progress`; some is a process's `own`: BatchNorm's
    statistics, which differ until the end of an epoch, what was counted, and with a perturbation that each process has
    for itself also what the method keeps of it.
    """

    config: Config
    world: Distributed
    model: nn.Module
    optimizer: SharpnessAware
    loader: Loader
    lr_schedule: LambdaLR
    budget: CosineBudget | None
    scaler: GradScaler | None
    ema: WeightAverage | None
    nonfinite: NonFiniteSteps
    metric: Metric
    chosen_by: Metric | None

    def progress(self) -> dict[str, Any]:
        """JSON, equal on all processes."""
        return {
            "lr_schedule": self.lr_schedule.state_dict(),
            "budget": self.budget.state_dict() if self.budget else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "data": self.loader.state_dict(),
            "config": flatten(self.config),
            "metric": asdict(self.metric),
            "chosen_by": None if self.chosen_by is None else asdict(self.chosen_by),
        }

    def own(self) -> dict[str, Tensor]:
        """This process's own tensors by name, as they are: not copies."""
        tensors = {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        if self.ema:
            tensors |= {f"ema.{name}": buffer for name, buffer in self.ema.buffers().items()}
        tensors |= {f"nonfinite.{name}": tensor for name, tensor in self.nonfinite.state().items()}
        tensors["skipped"] = self.optimizer.telemetry["skipped"]
        return tensors | self._memory()

    def check(self, progress: Mapping[str, Any]) -> None:
        """Refuse to go on from a checkpoint in a way that would be another run.

        Raises:
            UserError: other images, or another number of processes where each perturbs by its own gradient.
        """
        self.loader.load_state_dict(progress["data"])
        then, now, scope = progress["world_size"], self.world.world_size, self.config.optimizer.scope
        if scope != "global" and then != now:
            raise SharedError(
                f"cannot resume on {now} processes: the checkpoint is of {then}, and optimizer.scope is {scope}, so "
                f"each perturbs by a gradient of its own share of a batch. Start {then} processes."
            )

    @torch.no_grad()
    def restore(self, progress: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
        """Go on from what `progress` and `own` were; ``own`` is empty in a checkpoint of version 0.1."""
        self.lr_schedule.load_state_dict(progress["lr_schedule"])
        if progress["config"]["epochs"] != self.config.epochs:  # it has finished, and is trained for longer
            self._follow_schedule()
        if self.budget:
            self.budget.load_state_dict(progress["budget"])
        if self.scaler:
            self.scaler.load_state_dict(progress["scaler"])
        for name, tensor in self.own().items() if own else ():
            tensor.copy_(own[name])

    def _follow_schedule(self) -> None:
        """The learning rate of the coming step by the schedule of now: the optimizer's is that of another one."""
        schedule = self.lr_schedule
        rates = zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, peak, factor in rates:
            group["lr"] = peak * factor(schedule.last_epoch)

    def _memory(self) -> dict[str, Tensor]:
        """What the method keeps, where each process (or replica) has its own: checkpoints hold one copy of the rest."""
        if self.config.optimizer.scope == "global":
            return {}
        names = self.optimizer.names_in_use()
        state: dict[int, dict[str, Any]] = self.optimizer.state_dict()["state"]
        return {
            f"memory.{index}.{name}": local_shard(kept[name])
            for index, kept in state.items()
            for name in names
            if name in kept
        }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step: a resumed run draws what the uninterrupted one drew, after any step."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
