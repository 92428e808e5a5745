"""Loss scaling in float16: one scaler for both passes, whose overflow any process may find."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

from lesam_dist.optim.engine.loss_scale import LossScale
from lesam_dist.optim.engine.rule import Rule


class _Messenger(SGD):
    """An optimizer of one number, whose gradient tells a scaler of an overflow, and numbers to be scaled."""

    def __init__(self, device: torch.device) -> None:
        self.parameter = nn.Parameter(torch.zeros((), device=device))
        self.ones = torch.ones(3, dtype=torch.float64, device=device)
        super().__init__([self.parameter], lr=0.0)

    def tell(self, scaler: GradScaler, overflow: Tensor) -> None:
        """Bring a flag to the scaler; RuntimeError for a second one before its ``update()``."""
        self.parameter.grad = overflow.atanh()  # 0 where it is 0, infinite where it is 1
        scaler.unscale_(self)


class Scaled(Rule):
    """What an optimizer with two passes does for, and with, a `GradScaler`.

    It unscales nothing by the scaler, which would read and write each gradient. The engine works with gradients that
    are scaled, see `LossScale`, and the scaler learns of an overflow from a parameter that is there for this alone.
    """

    # What GradScaler.step asks for: it then calls step() whatever it found, and leaves the skipping to it.
    _step_supports_amp_scaling = True
    _grad_scaler: GradScaler | None = None
    _messenger: _Messenger | None = None
    _messenger_of_failures: _Messenger | None = None

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The scaler by which the closure scales the loss before ``backward``; the scale of both is taken off here."""
        return self._grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: GradScaler | None) -> None:
        if scaler is not None and scaler.is_enabled():
            # The scaler makes its scale on first use, and wants it before the first step, when no closure has run.
            scaler.scale(torch.zeros((), device=self.param_groups[0]["params"][0].device))
        self._grad_scaler = scaler

    def take_scale(self, first: LossScale | None = None) -> LossScale | None:
        """Know that the gradients that are there now are scaled, as much as the ``first`` ones of this step."""
        scaler = self._enabled_scaler()
        if scaler is None:
            return None
        scale = LossScale.of(scaler, self._known_messenger().ones) if first is None else first.again()
        self.weights.loss_scale = scale
        return scale

    def tell_scaler(self) -> None:
        """Let the scaler know whether a gradient of this step was not finite."""
        if scaler := self._enabled_scaler():
            self._known_messenger().tell(scaler, self.overflow)

    def tell_scaler_of_failure(self, has_looked: bool) -> None:
        """Let the scaler know what a step found before it raised, so that ``scaler.update()`` may follow, as ever.

        Or none may: the next step has another messenger.

        Args:
            has_looked: whether the step looked at a gradient; where not, it knows of no overflow.
        """
        scaler = self._enabled_scaler()
        if scaler is None:
            return
        device = self._known_messenger().ones.device
        if self._messenger_of_failures is None or self._messenger_of_failures.ones.device != device:
            self._messenger_of_failures = _Messenger(device)
        overflow = self.overflow if has_looked else torch.zeros((), device=device)
        with suppress(RuntimeError):  # several failures without an update are one
            self._messenger_of_failures.tell(scaler, overflow)

    def _enabled_scaler(self) -> GradScaler | None:
        scaler = self.known_scaler()
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _known_messenger(self) -> _Messenger:
        device = self.param_groups[0]["params"][0].device  # where the overflow flag is from the first climb on
        if self._messenger is None or self._messenger.ones.device != device:
            self._messenger = _Messenger(device)
        return self._messenger

    def known_scaler(self) -> GradScaler | None:
        """The scaler, if any; RuntimeError where one calls ``step`` that was not made known."""
        if self._grad_scaler is None and getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step was called by a GradScaler that it does not know, so it cannot unscale "
                "the gradients of its passes. Set optimizer.grad_scaler = scaler once (with accelerate: "
                "optimizer.optimizer.grad_scaler = accelerator.scaler)."
            )
        return self._grad_scaler
