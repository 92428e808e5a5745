"""Sharpness-aware optimizers in Hugging Face's `Trainer`, whose loop knows of one pass only.

    before: Trainer(model, args, train_dataset=data)
    after:  SharpnessAwareTrainer(model, args, train_dataset=data, sharpness=(LESAM, {"sigma": 0.1, "rho_max": 0.3}))

`Trainer` computes gradients in ``training_step``, one micro-batch at a time, and then calls ``optimizer.step()``
without a closure. Here the last ``training_step`` before an update makes all passes, over all micro-batches of it, and
the update; the others wait. The loop's own clipping and ``optimizer.step()`` find no gradients, so they change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lesam_dist.optim.budget import CosineBudget
from lesam_dist.optim.engine.base import SharpnessAware
from lesam_dist.train.alike import Alike

try:
    from accelerate import DistributedType
    from transformers import Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lesam_dist.transformers needs {error.name}: pip install transformers accelerate", name=error.name
    ) from error

_ANYTHING: Any = object  # what the mixin stands before, which is a Trainer
_IN_LOGS = ("rho", "sigma", "grad_norm", "perturbed_loss", "skipped")


class SharpnessAwareMixin(_ANYTHING):  # type: ignore[misc]
    """Both passes in any subclass of `Trainer`: ``class Mine(SharpnessAwareMixin, Seq2SeqTrainer): ...``.

    Args:
        sharpness: a method and its arguments, as `Trainer` takes ``optimizer_cls_and_kwargs``. The base optimizer, its
            learning rate, betas and weight decay are those of `TrainingArguments`, or of ``optimizer_cls_and_kwargs``.
            None where ``optimizers=(optimizer, scheduler)`` holds a sharpness-aware optimizer.
        budget: ``budget(optimizer, total_steps)`` gives a `CosineBudget` once the number of steps is known. sigma is
            then that of ``state.global_step``, also after a resume.

    ``TrainingArguments.max_grad_norm`` clips the gradient of the update and never the first one, unless the method's
    own ``max_grad_norm`` is given. A training log has ``rho``, ``sigma``, ``perturbed_loss`` and ``skipped`` too, and
    its ``grad_norm`` is the length of the gradient that perturbs.

    Raises:
        ValueError: where both ``sharpness`` and an optimizer are given, or DeepSpeed makes the steps, or FSDP1 shards.
        TypeError: where the optimizer is not sharpness-aware.
    """

    def __init__(
        self,
        *args: Any,
        sharpness: tuple[Callable[..., SharpnessAware], Mapping[str, Any]] | None = None,
        budget: Callable[[Optimizer, int], CosineBudget] | None = None,
        **kwargs: Any,
    ) -> None:
        self.optimizer_cls_and_kwargs: Any  # Trainer's
        self.sharpness, self.budget = sharpness, budget
        self._schedule: CosineBudget | None = None
        self._batches: list[Any] = []  # the micro-batches of the next update
        super().__init__(*args, **kwargs)
        if sharpness is not None and self.optimizer is not None:
            raise ValueError(
                "SharpnessAwareTrainer: both sharpness= and optimizers= give an optimizer. Leave one of them out."
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1:
            raise ValueError(
                "SharpnessAwareTrainer: FSDP1's shards do not say that they are, so the norm would be each "
                'process\'s own. Choose FSDP2: TrainingArguments(fsdp_config={"version": 2}).'
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "SharpnessAwareTrainer: DeepSpeed makes the steps itself, after one pass. Shard with FSDP2 instead: "
                'TrainingArguments(fsdp="full_shard", fsdp_config={"version": 2}).'
            )

    @property
    def sharpness_aware(self) -> SharpnessAware:
        """The optimizer, inside of accelerate's wrapper."""
        optimizer = self.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, SharpnessAware):
            raise TypeError(
                f"SharpnessAwareTrainer: the optimizer is a {type(inner).__name__}, which makes one pass. Give "
                'sharpness=(LESAM, {"sigma": 0.1, "rho_max": 0.3}), or optimizers=(LESAM(...), None).'
            )
        return inner

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As `Trainer`'s, which makes the base optimizer's groups; the method is around it."""
        if self.optimizer is None and self.sharpness is not None:
            given = self.optimizer_cls_and_kwargs
            base, base_kwargs = given or self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            method, arguments = self.sharpness
            # Bound to the base: what both call eps, alpha or rho would otherwise be the method's.
            self.optimizer_cls_and_kwargs = (method, {"base_optimizer": partial(base, **base_kwargs), **arguments})
            try:
                super().create_optimizer(model)
            finally:
                self.optimizer_cls_and_kwargs = given
        else:
            super().create_optimizer(model)
        inner = self.sharpness_aware
        if inner.options.max_grad_norm is None and self.args.max_grad_norm:
            inner.options = replace(inner.options, max_grad_norm=self.args.max_grad_norm)
        return self.optimizer  # type: ignore[no-any-return]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """As `Trainer`'s, and the budget's beside it."""
        if self.budget is not None:
            self._schedule = self.budget(self.sharpness_aware, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As `Trainer`'s: the micro-batches of the next update, which are kept for its passes."""
        self._batches, items = super().get_batch_samples(*args, **kwargs)
        return self._batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """All passes of an update and the update, in its last micro-batch.

        Returns:
            The loss of the update at the unperturbed weights, 0-d; 0 in micro-batches before the last.
        """
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches = self._batches or [inputs]
        optimizer = self.sharpness_aware
        if optimizer.grad_scaler is not self.accelerator.scaler:
            optimizer.grad_scaler = self.accelerator.scaler  # the loop's own optimizer.step() updates it
        if self._schedule is not None:
            self._schedule.load_state_dict({"last_step": self.state.global_step})
        alike, pass_over = Alike(model, self.args.device), super().training_step

        def closure(*, sync: bool | str = True, **others: Any) -> Tensor:
            _require_plain(optimizer, sync, others)
            losses = []
            with alike():
                for index, batch in enumerate(batches):
                    reduces = sync and index == len(batches) - 1
                    with nullcontext() if reduces else self.accelerator.no_sync(model):
                        losses.append(pass_over(model, batch, num_items_in_batch))
            return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

        loss: Tensor = optimizer.step(closure)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer`'s; what is logged in training has the perturbation's numbers too."""
        if "loss" in logs:
            telemetry = self.sharpness_aware.telemetry
            logs |= {name: float(telemetry[name]) for name in _IN_LOGS if name in telemetry}
        super().log(logs, *args, **kwargs)


class SharpnessAwareTrainer(SharpnessAwareMixin, Trainer):  # type: ignore[misc]
    """Hugging Face's `Trainer` with both passes of a sharpness-aware optimizer; see `SharpnessAwareMixin`."""


def _require_plain(optimizer: SharpnessAware, sync: bool | str, others: Mapping[str, Any]) -> None:
    """Refuse passes over parts of a batch: what a part's loss is to be divided by, `Trainer` alone knows."""
    asked = ["sync='replica'"] if sync == "replica" else []
    asked += [f"{name}={value!r}" for name, value in others.items() if name != "subset"]
    if asked:
        raise TypeError(
            f"SharpnessAwareTrainer: {type(optimizer).__name__} asks for a pass with {', '.join(asked)}, and a "
            "Trainer's pass takes the whole batch and reduces over all processes or none. Build it without "
            "scope='replica' and ascent_fraction below 1; ESAM with gamma=1."
        )
