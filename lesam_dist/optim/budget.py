"""The schedule of LE-SAM's loss budget sigma (paper, Section 4.3 and Algorithm 1, line 6).

    sigma(t) = sigma0 * f(t),   t = 0 ... total_steps - 1

      f rises linearly from 0 at t = 0 to 1 at t = warmup_steps - 1      (the paper has none; the authors' code has)
      f = 1                                                             in between
      f falls as (1 + cos) / 2 over the last anneal_steps, to exactly 0 at t = total_steps - 1

The paper's tables say "Budget annealing (epoch) 160" of 200. Algorithm 1 calls that number a length, the authors'
code uses it as the epoch at which annealing starts. Recipes therefore spell out ``anneal_start_epoch``; this class
takes a length, in steps.
"""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer


class CosineBudget:
    """Schedules ``sigma`` in every param group of a `LESAM`, used like a torch LR scheduler.

    The first value is set on construction; call `step` after each ``optimizer.step``. Groups keep their own
    ``initial_sigma``; a group that is added later starts from its own sigma. After the last step sigma stays 0.

    Args:
        optimizer: one whose param groups have a ``sigma``.
        total_steps: length of the run in optimizer steps, >= 1.
        anneal_steps: length of the final cosine, 0 (sigma stays constant) to ``total_steps - warmup_steps``.
        warmup_steps: length of the linear rise, >= 0.

    Raises:
        ValueError: where the lengths do not fit, or the optimizer has no ``sigma``.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, anneal_steps: int, warmup_steps: int = 0) -> None:
        if total_steps < 1 or anneal_steps < 0 or warmup_steps < 0:
            raise ValueError(
                f"CosineBudget: total_steps={total_steps} must be >= 1, anneal_steps={anneal_steps} and "
                f"warmup_steps={warmup_steps} must be >= 0."
            )
        if anneal_steps + warmup_steps > total_steps:
            raise ValueError(
                f"CosineBudget: warmup_steps={warmup_steps} and anneal_steps={anneal_steps} do not fit into "
                f"total_steps={total_steps}; shorten one of them."
            )
        if any("sigma" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"CosineBudget schedules the sigma of LE-SAM; {type(optimizer).__name__} has none in its param groups."
            )
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.anneal_steps = anneal_steps
        self.warmup_steps = warmup_steps
        self.last_step = 0
        self._apply()

    def factor(self, step: int) -> float:
        """f(step): the fraction of the initial budget at a step counted from 0."""
        if step < self.warmup_steps:
            return step / (self.warmup_steps - 1) if self.warmup_steps > 1 else 1.0
        start = self.total_steps - self.anneal_steps
        if self.anneal_steps == 0 or step < start:
            return 1.0
        if step >= self.total_steps - 1:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * (step - start) / (self.anneal_steps - 1)))

    def step(self) -> None:
        """Go on to the next step's budget."""
        self.last_step += 1
        self._apply()

    def get_last_sigma(self) -> list[float]:
        """The current budget of each param group."""
        return [group["sigma"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The step counter; the initial budgets live in the optimizer's param groups."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved step. Load the optimizer first."""
        self.last_step = int(state_dict["last_step"])
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            # As torch's schedulers keep `initial_lr`: a schedule rebuilt after a resume starts from the same value.
            group["sigma"] = group.setdefault("initial_sigma", group["sigma"]) * self.factor(self.last_step)
