"""Sharpness-aware optimizers in Lightning 2: ``Trainer(callbacks=[SharpnessAwareCallback()])``.

Lightning passes ``step`` a closure, so a sharpness-aware optimizer makes both passes there without any help. What the
callback adds is what a pass needs to know that Lightning's closure does not say: which of the passes it is.

    the first            moves BatchNorm's statistics, is what ``self.log`` and ``outputs`` show
    each further one     begins with the random numbers of the first, and is quiet
    the last             is followed by ``on_before_optimizer_step`` and by gradient clipping
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from lesam_dist.optim.budget import CosineBudget
from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.train.alike import Alike

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loops.optimization.closure import AbstractClosure
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lesam_dist.lightning needs {error.name}: pip install lightning", name=error.name
    ) from error

_SHOWN = ("rho", "sigma", "grad_norm", "loss", "perturbed_loss", "skipped")


class SharpnessAwareCallback(Callback):  # type: ignore[misc]
    """Makes Lightning's passes alike, logs what perturbs, and refuses at the start of ``fit`` what would go wrong.

    For automatic optimization, and for manual where it calls ``self.optimizers().step(closure)``. Other optimizers
    beside a sharpness-aware one are left alone.

    Args:
        budget: ``budget(optimizer, total_steps)`` gives a `CosineBudget` once the number of steps is known. sigma is
            then that of ``trainer.global_step``, also after a resume.
        prefix: of the names under which ``rho``, ``sigma``, ``grad_norm``, ``loss``, ``perturbed_loss`` and ``skipped``
            are logged at each step; None logs nothing. They are device scalars, read where a logger reads them.

    Raises:
        TypeError: at the start of ``fit``, where no optimizer is sharpness-aware; in a step, for a method whose passes
            Lightning's closure cannot make.
        ValueError: at the start of ``fit``, for ``accumulate_grad_batches``, ``gradient_clip_val`` with 16-mixed, or a
            strategy of FSDP1 or DeepSpeed.
    """

    def __init__(
        self, *, budget: Callable[[Optimizer, int], CosineBudget] | None = None, prefix: str | None = "sharpness/"
    ) -> None:
        self.budget, self.prefix = budget, prefix
        self._schedule: CosineBudget | None = None
        self._plugin: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings, and take over the optimizer's step from the precision plugin until the end of ``fit``."""
        optimizers = _sharpness_aware(trainer)
        _require_right_numbers(trainer, pl_module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in optimizers:
            optimizer.grad_scaler = scaler
        if self.budget is not None:
            self._schedule = self.budget(optimizers[0], _total_steps(trainer))
        self._plugin, theirs = trainer.precision_plugin, trainer.precision_plugin.optimizer_step

        def optimizer_step(optimizer: Any, model: LightningModule, closure: Callable[..., Any], **kwargs: Any) -> Any:
            if not isinstance(optimizer, SharpnessAware):
                return theirs(optimizer, model=model, closure=closure, **kwargs)
            return _step(trainer, optimizer, model, closure)

        self._plugin.optimizer_step = optimizer_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set this step's sigma."""
        if self._schedule is not None:
            self._schedule.load_state_dict({"last_step": trainer.global_step})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the telemetry of the step."""
        optimizers = _sharpness_aware(trainer)
        for index, optimizer in enumerate(optimizers if self.prefix is not None else []):
            name = f"{self.prefix}{index}/" if len(optimizers) > 1 else self.prefix
            telemetry = {f"{name}{key}": optimizer.telemetry[key] for key in _SHOWN if key in optimizer.telemetry}
            pl_module.log_dict(telemetry, on_step=True, on_epoch=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the precision plugin its own step back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As `teardown`, which Lightning then does not call."""
        self._give_back()

    def _give_back(self) -> None:
        if self._plugin is not None:
            del self._plugin.optimizer_step
            self._plugin = None


class _Passes:
    """Lightning's closure as an optimizer calls it, once per pass."""

    def __init__(self, trainer: Trainer, optimizer: SharpnessAware, model: LightningModule, closure: Any) -> None:
        self.trainer, self.optimizer, self.model, self.closure = trainer, optimizer, model, closure
        self._alike, self._first = Alike(model, model.device), None
        self._calls = 0

    def __call__(self, *, sync: bool | str = True, **others: Any) -> Any:
        _require_plain(self.optimizer, self.closure, sync, others)
        unreduced = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        quiet = _quiet(self.model) if self._calls else nullcontext()
        with self._alike(), quiet, nullcontext() if sync else unreduced():
            loss = self.closure(**others)
        self._calls += 1
        if self._calls == 1:
            self._first = getattr(self.closure, "_result", None)
        if self.optimizer.descends:
            self.trainer.precision_plugin._after_closure(self.model, self.optimizer)  # Lightning's hooks and clipping
        return loss

    def show_first(self) -> None:
        """Let ``outputs`` and the progress bar show the first pass, which was at the weights."""
        if self._first is not None:
            self.closure._result = self._first


def _step(trainer: Trainer, optimizer: SharpnessAware, model: LightningModule, closure: Any) -> Any:
    passes = _Passes(trainer, optimizer, model, closure)
    loss = optimizer.step(passes)
    if optimizer.grad_scaler is not None:
        optimizer.grad_scaler.update()
    passes.show_first()
    return loss


@contextmanager
def _quiet(model: LightningModule) -> Iterator[None]:
    """Inside, ``self.log`` and ``self.log_dict`` do nothing."""
    model.log = lambda *_, **__: None
    try:
        yield
    finally:
        del model.log


def _sharpness_aware(trainer: Trainer) -> list[SharpnessAware]:
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SharpnessAware)]
    if not found:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
        raise TypeError(
            f"SharpnessAwareCallback: no optimizer is sharpness-aware ({kinds}). Return one from configure_optimizers: "
            "LESAM(self.parameters(), torch.optim.SGD, sigma=0.3, rho_max=0.2, lr=0.1)."
        )
    return found


def _require_right_numbers(trainer: Trainer, model: LightningModule) -> None:
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(
            f"SharpnessAwareCallback: under {type(trainer.strategy).__name__} the shards do not say that they are, "
            "so the norm would be each process's own. Shard with FSDP2: Trainer(strategy=ModelParallelStrategy())."
        )
    if not model.automatic_optimization:
        return
    if (batches := trainer.accumulate_grad_batches) > 1:
        raise ValueError(
            f"SharpnessAwareCallback: with accumulate_grad_batches={batches} Lightning's closure is the last batch "
            "alone, and the second pass needs all of them. Use a loader with larger batches, and manual optimization "
            "with a closure that goes through a batch in parts."
        )
    if trainer.gradient_clip_val and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"SharpnessAwareCallback: gradient_clip_val={trainer.gradient_clip_val} would clip gradients that are "
            f"scaled for 16-mixed. Leave it out, and give the optimizer max_grad_norm={trainer.gradient_clip_val}."
        )


def _total_steps(trainer: Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if total == float("inf") or len(trainer.optimizers) > 1:
        raise ValueError(
            f"SharpnessAwareCallback: budget needs to know how many steps the optimizer makes, and this is {total} for "
            f"{len(trainer.optimizers)} optimizer(s) here. Set max_steps or max_epochs, and with several optimizers "
            "leave budget out and make a CosineBudget of your own."
        )
    return int(total)


def _require_plain(optimizer: SharpnessAware, closure: Any, sync: bool | str, others: Mapping[str, Any]) -> None:
    """Refuse passes that the closure cannot make; in manual optimization it is the user's, who may know how."""
    asked = ["sync='replica'"] if sync == "replica" else []
    if isinstance(closure, AbstractClosure):
        asked += [f"{name}={value!r}" for name, value in others.items() if not isinstance(value, torch.Tensor)]
    if asked:
        raise TypeError(
            f"SharpnessAwareCallback: {type(optimizer).__name__} asks for a pass with {', '.join(asked)}, and "
            "Lightning's training_step takes the whole batch and reduces over all processes or none. Build the "
            "optimizer without scope='replica' and ascent_fraction below 1, ESAM with gamma=1; or use manual "
            "optimization, with a closure that takes these keywords."
        )
