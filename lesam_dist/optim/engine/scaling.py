"""Loss scaling in float16: one scaler for both passes, whose overflow any process may find."""

from __future__ import annotations

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from lesam_dist.optim.engine.rule import Rule
from lesam_dist.parallel.shards import reduce_max


class Scaled(Rule):
    """What an optimizer with two passes does for, and with, a `GradScaler`."""

    # What GradScaler.step asks for: it then calls step() whatever it found, and leaves the skipping to it.
    _step_supports_amp_scaling = True
    _grad_scaler: GradScaler | None = None

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The scaler by which the closure scales the loss before ``backward``; both passes are unscaled here."""
        return self._grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: GradScaler | None) -> None:
        if scaler is not None and scaler.is_enabled():
            if self.options.norm_in_backward:
                raise ValueError(
                    f"{type(self).__name__}: norm_in_backward=True takes the norms before a GradScaler can unscale the "
                    "gradients. Leave it out, or train in bfloat16, which needs no scaler."
                )
            # The scaler makes its scale on first use, and wants it before the first step, when no closure has run.
            scaler.scale(torch.zeros((), device=self.param_groups[0]["params"][0].device))
        self._grad_scaler = scaler

    def unscale(self, optimizer: Optimizer) -> None:
        """Take the loss scale off the gradients; the scaler allows it once per optimizer and step."""
        if scaler := self.known_scaler():
            scaler.unscale_(optimizer)

    def known_scaler(self) -> GradScaler | None:
        """The scaler, if any; RuntimeError where one calls ``step`` that was not made known."""
        if self._grad_scaler is None and getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step was called by a GradScaler that it does not know, so it cannot unscale "
                "the gradients of its passes. Set optimizer.grad_scaler = scaler once (with accelerate: "
                "optimizer.optimizer.grad_scaler = accelerator.scaler)."
            )
        return self._grad_scaler

    def share_overflow(self) -> None:
        """Let the scaler of every process see that one's first gradient was not finite, or their scales part.

        It looks at gradients only, so one is spoilt; this step makes no update anyway.
        """
        overflow = self.weights.overflow
        reduce_max(overflow)
        present = (g for grads in self.weights.gradients().tensors for g in grads if g is not None and g.numel())
        if (g := next(present, None)) is not None:
            g.div_(1 - overflow.to(g.device))
