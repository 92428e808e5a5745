"""A jump of the loss: back to the last checkpoint, and on without the batch that it came with.

As large models are trained (Chowdhery et al., 2022, PaLM, section 5.1, who left out some hundred batches): the same
batches do other weights no harm, so leaving them out is enough. Of every step the loss at the exact weights, the mean
over all processes, is compared with the average of those before it,

    average_t = (1 - b) * sum_i b^i * loss_{t-1-i} / (1 - b^t),  b = 0.98        about the last 50

and is a jump where it is higher by more than ``guard.max_loss_increase``, from the 21st on. Losses of steps that were
skipped, or that are not finite, count for nothing: those steps changed no weight.

The sum over the processes of one number is begun in a step and read in the next, so nobody waits. What is decided
depends on the losses alone, not on when they are read: it is the same on all processes, and after a stop and a resume.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lesam_dist.config.schema import GuardConfig
from lesam_dist.errors import SharedError
from lesam_dist.parallel.processes import Distributed

KEEP = 0.98
"""Share of the average that a step keeps."""

FIRST = 20
"""Losses that make an average before one is compared with it."""

_SHOWN = 5  # jumps that an error tells of


@dataclass(frozen=True)
class Jump:
    """A batch that is left out: the step that it came with, from 1, its loss, and the average before it."""

    step: int
    loss: float
    average: float

    def __str__(self) -> str:
        return f"step {self.step} (loss {self.loss:.4g}, average before it {self.average:.4g})"


class LossGuard:
    """Watches a run's loss. Where ``max_loss_increase`` is None all its methods return at once.

    After each step::

        guard.observe(step, loss, skipped)
        if guard.verdict() is not None:
            ...                                 # load the last checkpoint, and from it:
            guard.load(state)

    Before each step ``guard.leaves_out(step)`` says whether its batch is left out: read, and counted as a step, but
    nothing is computed from it, and it is not observed. Before a checkpoint is written ``verdict(final=True)`` waits
    for the loss of the last step, so that no checkpoint is made of weights after a jump.

    Args:
        config: what a jump is, and how many there may be.
        world: this process among all; each makes one, and calls it alike.
    """

    def __init__(self, config: GuardConfig, world: Distributed) -> None:
        self._limit, self._most, self._world = config.max_loss_increase, config.max_rollbacks, world
        self._sum, self._count = 0.0, 0  # of the average, which is biased towards 0, and of the losses in it
        self._jumps: list[Jump] = []
        self._left_out: frozenset[int] = frozenset()
        self._pending: deque[tuple[int, _Mean]] = deque()
        self._stream = torch.cuda.Stream() if self.is_on and world.device.type == "cuda" else None

    @property
    def is_on(self) -> bool:
        """Whether it watches anything."""
        return self._limit is not None

    @property
    def rollbacks(self) -> int:
        """How often a run went back so far."""
        return len(self._jumps)

    def leaves_out(self, step: int) -> bool:
        """Whether nothing is to be computed from the batch of this step, counted from 1."""
        return step in self._left_out

    def observe(self, step: int, loss: Tensor, skipped: Tensor | None = None) -> None:
        """Take in a step's loss, and wait for nothing.

        Args:
            step: its number, from 1; each one once, in order.
            loss: of this rank's part of the batch, at the weights before the step; 0-d, on any device.
            skipped: 1 (0-d) where the step's update was left out; None where it was not.
        """
        if self.is_on:
            value = loss.detach().double()
            if skipped is not None:
                value = torch.where(skipped.to(value.device) != 0, math.nan, value)
            self._pending.append((step, _Mean(value, self._world, self._stream)))

    def verdict(self, *, final: bool = False) -> int | None:
        """The step whose batch is to be left out, after going back to the last checkpoint; None where all is well.

        Args:
            final: decide on the last step too, which waits for it; else on those before it.

        Raises:
            SharedError: it has happened more than ``max_rollbacks`` times.
        """
        while len(self._pending) > (0 if final else 1):
            step, mean = self._pending.popleft()
            loss = mean.read()
            if not math.isfinite(loss):
                continue
            average = self.average
            assert self._limit is not None
            if self._count >= FIRST and loss > average + self._limit:
                self._forget_pending()
                self._leave_out(Jump(step, loss, average))
                return step
            self._sum, self._count = KEEP * self._sum + (1 - KEEP) * loss, self._count + 1
        return None

    @property
    def average(self) -> float:
        """Of the losses decided on so far; nan before the first one."""
        return self._sum / (1 - KEEP**self._count) if self._count else math.nan

    def remark(self) -> str:
        """What to log of the last verdict."""
        last = self._jumps[-1]
        return (
            f"warning: the loss jumped at {last} by more than guard.max_loss_increase {self._limit:g}: going back to "
            f"the last checkpoint, and on without that batch (rollback {len(self._jumps)} of {self._most})."
        )

    def state(self) -> dict[str, Any]:
        """JSON, equal on all processes, for a checkpoint of after the last step.

        Raises:
            RuntimeError: where the last step has not been decided on.
        """
        if self._pending:
            raise RuntimeError("LossGuard.state: the last loss has not been looked at. Call verdict(final=True) first.")
        jumps = [[jump.step, jump.loss, jump.average] for jump in self._jumps]
        return {"sum": self._sum, "count": self._count, "left_out": jumps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, after a stop or a jump: its average; the batches of both are left out."""
        self._forget_pending()
        self._sum, self._count = state["sum"], state["count"]
        saved = [Jump(*jump) for jump in state["left_out"]]
        self._jumps = [*(jump for jump in saved if not self.leaves_out(jump.step)), *self._jumps]
        self._left_out = frozenset(jump.step for jump in self._jumps)

    def _leave_out(self, jump: Jump) -> None:
        if len(self._jumps) >= self._most:
            jumps = [*self._jumps, jump]
            told = ", ".join(map(str, jumps[-_SHOWN:]))
            raise SharedError(
                f"the loss has jumped by more than guard.max_loss_increase {self._limit:g} {len(jumps)} times, and "
                f"guard.max_rollbacks is {self._most}: {'last ' if len(jumps) > _SHOWN else ''}at {told}. Lower "
                "optimizer.lr or the radius, look at the data, or raise max_rollbacks and go on with --resume auto."
            )
        self._jumps.append(jump)
        self._left_out |= {jump.step}

    def _forget_pending(self) -> None:
        for _, mean in self._pending:
            mean.read()  # it is under way on all processes
        self._pending.clear()


class _Mean:
    """The mean of one number over the processes, under way.

    On CUDA the sum is followed on a stream of its own, so that the next step does not wait for it, and copied to pinned
    memory; reading waits for the copy alone.
    """

    def __init__(self, value: Tensor, world: Distributed, stream: torch.cuda.Stream | None) -> None:
        self._work: dist.Work | None = None
        self._event: torch.cuda.Event | None = None
        self._size = world.world_size
        self._value = value.to(world.device).clone()
        if world.world_size > 1:
            self._work = dist.all_reduce(self._value, async_op=True)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                if self._work is not None:
                    self._work.wait()  # of this stream, not of the host
                host = torch.empty((), dtype=torch.float64, pin_memory=True)
                self._device_value = self._value  # kept until the copy is done
                self._value = host.copy_(self._value, non_blocking=True)
                self._event = stream.record_event()

    def read(self) -> float:
        """Wait for it, if it is not there yet."""
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
        return float(self._value) / self._size
