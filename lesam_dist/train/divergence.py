"""Whether a run still learns: steps whose loss or gradient is not a number, counted where they happen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lesam_dist.config.schema import Config
from lesam_dist.errors import DivergedError
from lesam_dist.parallel.shards import local_shard
from lesam_dist.train.checkpoint import Checkpointer


class NonFiniteSteps:
    """Counts, on the device, the steps whose loss or gradient is not finite. Counting does not wait for the device.

    Attributes:
        total: such steps so far, float64 0-d.
        in_a_row: such steps since the last finite one, float64 0-d.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._warned = config, False
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.in_a_row = torch.zeros_like(self.total)
        self._skipped = torch.zeros_like(self.total)

    def state(self) -> dict[str, Tensor]:
        """What was counted, by name, as it is: not copies. A resumed run writes into it what it was."""
        return {"total": self.total, "in_a_row": self.in_a_row, "skipped": self._skipped}

    @torch.no_grad()
    def count(self, loss: Tensor, skipped: Tensor) -> None:
        """One more step.

        Args:
            loss: of this step, on this rank.
            skipped: updates that the optimizer has left out so far.
        """
        wrong = ~loss.isfinite()
        wrong |= skipped.to(self._skipped) > self._skipped
        self._skipped.copy_(skipped)
        self.total.add_(wrong)
        self.in_a_row.add_(1).mul_(wrong)

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
        """Raise a DivergedError after too many in a row."""
        if in_a_row >= self._config.max_nonfinite_steps:
            raise self.diverged(step, in_a_row, checkpoints)

    def diverged(self, step: int, in_a_row: float, checkpoints: Checkpointer | None) -> DivergedError:
        """The error to raise."""
        what = f"the loss or a gradient in the last {in_a_row:.0f} steps" if in_a_row else "the validation loss"
        sound = checkpoints.last_finite() if checkpoints else None
        return DivergedError(
            f"the run has diverged: {what} was not finite (inf or nan), up to step {step}. Lower optimizer.lr (it is "
            f"{self._config.optimizer.lr:g}) or the radius, warm up longer, or look at the data."
            + (f" The last checkpoint before that is {sound}." if sound else "")
        )


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """1 where every element that this rank holds is a number, else 0; float64 0-d."""
    shards = [shard for tensor in tensors if (shard := local_shard(tensor)).is_floating_point()]
    return torch.stack([shard.isfinite().all() for shard in shards]).all().double()
