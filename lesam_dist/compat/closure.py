"""``step(closure)`` as in the most used SAM code: the first pass has been made, and the closure is the second."""

from __future__ import annotations

from typing import Any

import torch

from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.optim.engine.contract import has_gradients


class FirstPassIsMade(SharpnessAware):
    """A method whose ``step`` begins with the gradients of the first pass in ``.grad``."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Perturb by the gradients that are there, call the closure, restore the exact weights and update them.

        Args:
            closure: computes the loss at the perturbed weights and calls ``backward``; it may clear the gradients
                first. None is as in `SharpnessAware.step`.

        Raises:
            RuntimeError: where there is no gradient of a first pass.
            Whatever the closure raises; the weights are then the exact ones.
        """
        if closure is None:
            super().step(None)
            return
        name = type(self).__name__
        if not has_gradients(p for group in self.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{name}.step(closure): no parameter has a gradient. As in the package that it stands in for, the "
                "closure is the second pass alone: call loss.backward() before. For closures that are called twice "
                "take the classes of lesam_dist itself."
            )
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            self.restore()
            raise
        self.second_step()
