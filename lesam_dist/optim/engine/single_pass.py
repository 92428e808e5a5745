"""Methods that perturb before the gradient is known, and so need one pass a step."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.base import Closure
from lesam_dist.optim.engine.fixed_radius import FixedRadius
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.weights import Aim
from lesam_dist.optim.engine.wrapper import BaseOptimizer


class SinglePass(FixedRadius):
    """One pass a step, at weights perturbed by what the steps before left.

    ``loss`` and ``perturbed_loss`` are both the loss at the perturbed weights. `first_step` perturbs and needs no
    gradients; `second_step` updates.

    Raises:
        ValueError: for an option about the first of two passes.
    """

    def __init__(self, params: ParamsT, base_optimizer: BaseOptimizer, defaults: dict[str, Any], **kwargs: Any) -> None:
        for option, neutral in (("scope", "global"), ("ascent_fraction", 1.0), ("ascent_interval", 1)):
            if kwargs.get(option, neutral) != neutral:
                raise ValueError(
                    f"{type(self).__name__}: {option} is {kwargs[option]!r}, but it has no first pass to change. Leave "
                    f"it at {neutral!r}."
                )
        if not kwargs.get("check_second", True):
            raise ValueError(f"{type(self).__name__}: check_second is False, but its only gradient must be checked.")
        super().__init__(params, base_optimizer, defaults, **kwargs)

    def look_ahead(self) -> Aim:
        """Along what the weights are perturbed; before there is anything, along nothing."""
        raise NotImplementedError

    def update_memory(self, grads: list[Gradients]) -> None:
        """Called with the gradients at the perturbed weights; a non-finite one has set `overflow`."""

    def aim(self, grads: list[Gradients]) -> Aim:
        return self.look_ahead()

    def _passes_of(self, closure: Closure, fresh: bool) -> tuple[Any, Any]:
        if not self.enabled:
            return super()._passes_of(closure, fresh)
        self.zero_grads()
        self._refresh()
        self._perturb([[None] * len(rows.params) for rows in self._perturbation.rows], fresh=fresh)
        loss = self.run_pass(closure)
        self._unscale(self)
        return loss, loss

    def mixture_factors(self, grads: list[Gradients]) -> None:
        self.update_memory(grads)
