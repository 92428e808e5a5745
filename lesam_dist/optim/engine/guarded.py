"""An optimizer whose weights may be perturbed: nothing is saved, loaded or changed meanwhile."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.base_optimizer import BaseOptimizer
from lesam_dist.optim.engine.contract import has_gradients
from lesam_dist.optim.engine.eager import eager
from lesam_dist.optim.engine.early_sums import Arrivals
from lesam_dist.optim.engine.fused import unfuse_dtensors
from lesam_dist.optim.engine.memory import ASCENT, Memory
from lesam_dist.optim.engine.options import Backend, Options
from lesam_dist.optim.engine.weights import Weights
from lesam_dist.optim.engine.wrapper import SharedOptimizer
from lesam_dist.parallel.bucket_arrivals import BucketHook, tell_of_buckets

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


class GuardedOptimizer(SharedOptimizer):
    """Owns the weights and the memory of a method, and keeps both right through every round trip.

    Args:
        params, base_optimizer, defaults, base_kwargs: see `SharedOptimizer`.
        backend: see `lesam_dist.optim.engine.backend.select`.
    """

    _has_buckets = False  # DDP's, which tell of gradients

    memory_names: tuple[str, ...] = ()  # of the tensors that a method keeps per parameter, see `Memory`

    weights: Weights
    options: Options

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        defaults: dict[str, Any],
        backend: Backend,
        **base_kwargs: Any,
    ) -> None:
        self._backend = backend
        self._memory = Memory()
        self.forget()
        super().__init__(params, base_optimizer, defaults, **base_kwargs)

    def names_in_use(self) -> tuple[str, ...]:
        """Of the tensors in the memory that this optimizer, with its options, will have."""
        return self.memory_names

    @eager
    def restore(self) -> None:
        """Back to the exact weights without an update, e.g. after an exception; harmless when not perturbed."""
        self.weights.restore()
        self._memory.drop()

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are the perturbed ones: between `first_step` and `second_step` or `restore`."""
        return self.weights.active

    def forget(self) -> None:
        arrivals: Arrivals = "buckets" if self._has_buckets else "hooks"
        self.weights = Weights(self._backend, arrivals if self.options.norm_in_backward else None)

    def sum_buckets(self, model: DistributedDataParallel, hook: BucketHook | None = None, state: Any = None) -> None:
        """With ``norm_in_backward``, take the norms of DDP's gradients as they are reduced, bucket by bucket.

        Call it once, before the first backward, instead of ``model.register_comm_hook``, of which torch allows one.

        Args:
            model: what DDP made of the model.
            hook: reduces a bucket, as torch's ``register_comm_hook`` takes it; None reduces as DDP does.
            state: the hook's first argument; torch's own take a process group, None for all processes.

        Raises:
            ValueError: without ``norm_in_backward``, or where the gradients are not views of DDP's buckets.
        """
        name = type(self).__name__
        if not self.options.norm_in_backward:
            raise ValueError(f"{name}.sum_buckets: build it with norm_in_backward=True first.")
        if not model.gradient_as_bucket_view:
            raise ValueError(
                f"{name}.sum_buckets: DDP would copy the gradients out of its buckets after backward. Wrap the model "
                "with DistributedDataParallel(..., gradient_as_bucket_view=True)."
            )
        self._require_exact_weights("sum_buckets")
        tell_of_buckets(model, weakref.WeakMethod(self._bucket_arrived), hook, state)
        self._has_buckets = True
        self.forget()

    def _bucket_arrived(self, params: list[Tensor], grads: list[Tensor]) -> None:
        if self.weights.early is not None:
            for p, grad in zip(params, grads, strict=True):
                self.weights.early.arrived(p, grad)

    # Each of these would lose the copies, or save perturbed weights.

    def train(self) -> None:
        """The weights to train with, where the base optimizer has others to evaluate: schedule-free ones."""
        self._switch("train")

    def eval(self) -> None:
        """The weights to evaluate and to save, where the base optimizer has others to train: schedule-free ones."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        switch = getattr(self.base_optimizer, mode, None)
        if switch is None or all(group.get("train_mode") is (mode == "train") for group in self.param_groups):
            return  # Hugging Face's Trainer calls it in every pass
        self._require_exact_weights(mode)
        switch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; not while the weights are perturbed."""
        self._require_exact_weights("add_param_group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, also from a plain base optimizer's; not while the weights are perturbed."""
        self._require_exact_weights("load_state_dict")
        super().load_state_dict(state_dict)
        self._memory.unpack((ASCENT, *self.memory_names), self.state)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: the base optimizer's state, and the groups with this method's hyper-parameters.

        Raises:
            RuntimeError: while the weights are perturbed, so that no checkpoint can hold them.
        """
        self._require_exact_weights("state_dict")
        state_dict = super().state_dict()
        self._memory.pack(state_dict, self.param_groups)
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        self._require_exact_weights("pickle")
        return {**super().__getstate__(), "_backend": self._backend, "_memory": self._memory}

    def _require_exact_weights(self, call: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"{type(self).__name__}.{call}: the weights are perturbed, by an earlier first_step(). Call "
                "second_step() to update or restore() to undo, then go on."
            )

    def _create_state(self) -> None:
        """``step(None)``: create the base optimizer's state without moving anything.

        torch.distributed.checkpoint does this with zero gradients before it saves or loads.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if has_gradients(params):
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() was called without a closure while there are gradients. {name} needs two passes: call "
                "step(closure), with a closure that computes the loss and calls backward, or first_step() and "
                "second_step()."
            )
        for memory_name in self.names_in_use():
            self._memory.create(memory_name, self.param_groups)
        if self.state or not params:
            return
        base = self.base_optimizer
        saved = [dict(group) for group in self.param_groups]
        for group in self.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        # torch's own move nothing by zero gradients at a learning rate of zero; of others that is not known.
        weights = [] if type(base).__module__.startswith("torch.") else [p.detach().clone() for p in params]
        unfuse_dtensors(base)
        base.step()
        for group, before in zip(self.param_groups, saved, strict=True):
            group.clear()
            group.update(before)
        for p, w in zip(params, weights, strict=bool(weights)):
            p.detach().copy_(w)
        for state in self.state.values():
            step = state.get("step") if isinstance(state, dict) else None
            if isinstance(step, Tensor):
                step.zero_()  # nothing was stepped
            elif step is not None:
                state["step"] = 0

    def zero_grads(self) -> None:
        """Zero all gradients as the options say."""
        self.weights.loss_scale = None
        if self.weights.early is not None:
            self.weights.early.drop()
        if self.options.static_grads:
            self.zero_grad(set_to_none=False)
            return
        for group in self.param_groups:  # torch's own takes three times as long, twice a step
            for p in group["params"]:
                p.grad = None
