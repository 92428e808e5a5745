"""Whether a run still learns: steps whose loss or gradient is not a number, counted where they happen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lesam_dist.config.schema import Config
from lesam_dist.errors import DivergedError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.train.checkpoint import Checkpointer

_REMEMBERED = 3  # good steps that an error tells of


class NonFiniteSteps:
    """Counts, on the device, the steps whose loss or gradient is not finite. Counting does not wait for the device.

    Of the last steps that were finite it keeps, there too, what an error tells of them.

    Args:
        config: the run.
        world: this process among all.

    Attributes:
        total: such steps so far, float64 0-d.
        in_a_row: such steps since the last finite one, float64 0-d.
    """

    def __init__(self, config: Config, world: Distributed) -> None:
        self._config, self._world, self._warned = config, world, False
        self.total = torch.zeros((), dtype=torch.float64, device=world.device)
        self.in_a_row = torch.zeros_like(self.total)
        self._skipped = torch.zeros_like(self.total)
        self._step = torch.zeros_like(self.total)
        self._good = self.total.new_zeros(_REMEMBERED, 4)  # step, loss, rho, grad_norm, the newest last; step 0: none

    def state(self) -> dict[str, Tensor]:
        """What was counted, by name, as it is: not copies. A resumed run writes into it what it was."""
        return {"total": self.total, "in_a_row": self.in_a_row, "skipped": self._skipped, "good": self._good}

    @torch.no_grad()
    def count(self, step: int, loss: Tensor, telemetry: Mapping[str, Tensor]) -> None:
        """One more step.

        Args:
            step: its number, from 1.
            loss: of this step, on this rank.
            telemetry: the optimizer's after it: ``skipped`` (updates left out so far), ``rho``, ``grad_norm``.
        """
        wrong = ~loss.isfinite()
        skipped = telemetry["skipped"].to(self._skipped)
        wrong |= skipped > self._skipped
        self._skipped.copy_(skipped)
        self.total.add_(wrong)
        self.in_a_row.add_(1).mul_(wrong)
        values = (loss, telemetry["rho"], telemetry["grad_norm"])
        row = torch.stack([self._step.fill_(step), *(value.detach().to(self._step) for value in values)])
        self._good.copy_(torch.where(wrong, self._good, torch.cat([self._good[1:], row[None]])))

    def warning(self, step: int, total: float, in_a_row: float) -> str | None:
        """What to say, once, after the first such step; None for nothing.

        In float16 a few are expected: GradScaler finds its scale by steps that overflow.
        """
        most = self._config.max_nonfinite_steps
        expected = self._config.precision.compute == "fp16" and in_a_row < most / 2
        if self._warned or total == 0 or expected:
            return None
        self._warned = True
        return (
            f"warning: up to step {step} the loss or a gradient was not finite (inf or nan) in {total:.0f} steps. The "
            f"run stops after {most} in a row (max_nonfinite_steps). This is said once."
        )

    def require_few(self, step: int, in_a_row: float, checkpoints: Checkpointer | None) -> None:
        """Raise a DivergedError after too many in a row, which all processes know of alike."""
        if in_a_row >= self._config.max_nonfinite_steps:
            raise self.diverged(step, in_a_row, checkpoints)

    def diverged(self, step: int, in_a_row: float, checkpoints: Checkpointer | None) -> DivergedError:
        """The error to raise; made on all processes at once."""
        what = f"the loss or a gradient in the last {in_a_row:.0f} steps" if in_a_row else "the validation loss"
        sound = checkpoints.last_finite() if checkpoints else None
        return DivergedError(
            f"the run has diverged: {what} was not finite (inf or nan), up to step {step}.{self._last_good()} Lower "
            f"optimizer.lr (it is {self._config.optimizer.lr:g}) or the radius, warm up longer, or look at the data."
            + (f" The last checkpoint before that is {sound}." if sound else "")
        )

    def _last_good(self) -> str:
        values = self._world.mean(list(self._good.flatten()))
        rows = [values[start : start + 4] for start in range(0, len(values), 4)]
        told = [
            f"step {step:.0f}: loss {loss:.4g}, rho {rho:.4g}, grad_norm {grad_norm:.4g}"
            for step, loss, rho, grad_norm in rows
            if step
        ]
        return f" The last good steps: {'; '.join(told)}." if told else " No step was good."


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """1 where every element that this rank holds is a number, else 0; float64 0-d."""
    shards = [shard for tensor in tensors if (shard := local_shard(tensor)).is_floating_point()]
    return torch.stack([shard.isfinite().all() for shard in shards]).all().double()
