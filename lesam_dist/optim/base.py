"""The two-pass protocol that every sharpness-aware optimizer shares: order of passes, state, telemetry.

No maths here (`reference` and the kernels have it) and no knowledge of how a pass is made (the closure has it).
A method is a subclass that names its rule: how the radius follows from the norm, and how both gradients mix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from lesam_dist.optim import ops as operations
from lesam_dist.optim import reference
from lesam_dist.optim.ops import Backend, Ops
from lesam_dist.optim.reference import Radius
from lesam_dist.parallel import local_shard, reduce_over_shards, shard_axes

BaseOptimizer = Callable[..., Optimizer]
Closure = Callable[..., Any]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HAS_FUSED = (SGD, Adam, AdamW)


class SharpnessAware(Optimizer):
    """A torch optimizer that takes its gradient at perturbed weights and updates the exact ones.

    ``step(closure)`` makes both passes; ``first_step`` and ``second_step`` are for hand-written loops. The update
    is made by ``base_optimizer``, a real torch optimizer that shares ``param_groups`` and ``state`` with this one.

    ``telemetry`` maps names to 0-d tensors, which live on the parameters' device and cost nothing until read:
    ``grad_norm`` and ``rho`` of the last perturbation, ``sigma`` where the method has a budget, ``skipped`` (updates
    left out so far because a gradient was not finite) and, after ``step``, ``loss`` and ``perturbed_loss``. With
    several param groups of different settings, ``rho`` and ``sigma`` are those of the first perturbed one.

    Args:
        params: parameters or param groups. ``perturb=False`` in a group leaves it out of norm and perturbation.
        base_optimizer: class (or function) that builds the base optimizer from the groups and ``base_kwargs``.
        defaults: the method's own hyper-parameters, kept in every param group.
        backend: "auto", "reference" or "triton", see `lesam_dist.optim.ops.select`.
        base_kwargs: for ``base_optimizer``. torch's fused implementation of SGD, Adam and AdamW is used unless
            ``fused`` or ``foreach`` says otherwise.

    Raises:
        TypeError: for a parameter of an unsupported dtype.
        ValueError: for a hyper-parameter out of range.
    """

    _perturbed: list[list[Tensor]] | None  # the lists that `first_step` perturbed, None outside of a step
    _overflow: Tensor | None  # 0-d bool: the first gradient was not finite

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        defaults: dict[str, Any],
        *,
        backend: Backend = "auto",
        **base_kwargs: Any,
    ) -> None:
        groups = _as_groups(params)
        if _can_fuse(base_optimizer, groups, base_kwargs):
            base_kwargs["fused"] = True
        self.base_optimizer = base_optimizer(groups, **base_kwargs)
        shared = defaults.keys() & self.base_optimizer.defaults.keys()
        if shared:
            raise ValueError(
                f"{type(self).__name__} and {type(self.base_optimizer).__name__} both have a hyper-parameter "
                f"{sorted(shared)[0]!r}, and they share their param groups. Choose another base optimizer."
            )
        self._set_transient(backend)
        defaults = {"perturb": True, **defaults}
        super().__init__(self.base_optimizer.param_groups, defaults)
        self.defaults = {**self.base_optimizer.defaults, **defaults}

    # ---- the rule of a method ------------------------------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyper-parameter of this group that is out of range."""

    def radius(self, group: dict[str, Any]) -> Radius:
        """How this group's radius follows from the gradient norm, with the hyper-parameters of this step."""
        raise NotImplementedError

    def mixture(self, group: dict[str, Any]) -> tuple[float, float]:
        """``(a, b)``: the base optimizer steps with ``a * g_hat + b * g``."""
        return 1.0, 0.0

    # ---- the protocol --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Both passes and the update; gradients are zeroed before, between and after.

        Args:
            closure: clears nothing, computes the loss, calls ``backward`` and returns the loss. It is called twice,
                at the weights and at the perturbed weights, and must use the same batch. None changes nothing (torch's
                checkpointing calls it so to create the state) and is an error once there are gradients.

        Returns:
            The loss at the unperturbed weights.

        Raises:
            Whatever the closure raises; the weights are then the exact ones and no update was made.
        """
        if closure is None:
            return self._create_state()
        self._require_exact_weights("step")
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        try:
            self.first_step(zero_grad=True)
            with torch.enable_grad():
                perturbed_loss = closure()
        except BaseException:
            self.restore()
            raise
        self.second_step(zero_grad=True)
        self.telemetry["loss"] = torch.as_tensor(loss).detach()
        self.telemetry["perturbed_loss"] = torch.as_tensor(perturbed_loss).detach()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights, with the gradients of the first pass in ``.grad``.

        Raises:
            RuntimeError: if the weights are perturbed already.
        """
        self._require_exact_weights("first_step")
        by_radius: dict[Radius, list[Tensor]] = {}
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            if group["perturb"] and with_grad:
                by_radius.setdefault(self.radius(group), []).extend(with_grad)
        self._keep_first_gradients()
        self._perturb(by_radius)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the exact weights and update them, with the gradients of the second pass in ``.grad``.

        The update is left out, on every rank, where a gradient of either pass is not finite.

        Raises:
            RuntimeError: if `first_step` was not called.
        """
        if not self.is_perturbed:
            raise RuntimeError(f"{type(self).__name__}.second_step needs a first_step before it.")
        self.restore()
        self._mix_gradients()
        with_grad = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if with_grad:
            overflow = ~torch.isfinite(self._sum_sq(with_grad))
            if self._overflow is not None:
                overflow = overflow | self._overflow
            self.telemetry["skipped"] = self.telemetry["skipped"].to(overflow.device) + overflow
            self._base_step(overflow)
        self._opt_called = True  # what torch's LR schedulers ask for
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the exact weights without an update, e.g. after an exception; harmless when not perturbed."""
        for index, params in enumerate(self._perturbed or ()):
            self._ops_for(params[0], index).restore(_shards(params), [self._copies[p] for p in params])
        self._perturbed = None

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are the perturbed ones: between `first_step` and `second_step` or `restore`."""
        return self._perturbed is not None

    # ---- steps of the protocol -----------------------------------------------------------------------------------

    def _sum_sq(self, params: Iterable[Tensor]) -> Tensor:
        """Squared norm of the gradients of ``params`` over all shards: one launch and one reduction per mesh."""
        by_axes: dict[Any, list[Tensor]] = {}
        for p in params:
            by_axes.setdefault(shard_axes(p), []).append(_gradient(p))
        parts = [
            reduce_over_shards(self._ops_for(grads[0], f"norm {index}").sum_sq(grads), axes)
            for index, (axes, grads) in enumerate(by_axes.items())
        ]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def _perturb(self, by_radius: dict[Radius, list[Tensor]]) -> None:
        self._perturbed, self._overflow = [], None
        if not by_radius:
            return
        sum_sq = self._sum_sq(p for params in by_radius.values() for p in params)
        for index, (radius, params) in enumerate(by_radius.items()):
            shards, grads = _shards(params), [_gradient(p) for p in params]
            copies = [_buffer(self._copies, p, shard) for p, shard in zip(params, shards, strict=True)]
            stats = self._ops_for(params[0], index).perturb(shards, grads, copies, sum_sq, radius)
            self._perturbed.append(params)
            if index == 0:
                self._overflow = stats[2].bool()
                self.telemetry["grad_norm"], self.telemetry["rho"] = stats[0], stats[1]
                if math.isfinite(radius.sigma):
                    self.telemetry["sigma"] = torch.tensor(radius.sigma)

    def _keep_first_gradients(self) -> None:
        """Save g for groups whose update needs it. Copied: a DDP bucket is overwritten by the second backward."""
        for group in self.param_groups:
            if self.mixture(group) == (1.0, 0.0):
                continue
            for p in group["params"]:
                if p.grad is None:
                    self._first_gradients.pop(p, None)
                else:
                    _buffer(self._first_gradients, p, _gradient(p)).copy_(_gradient(p))

    def _mix_gradients(self) -> None:
        for group in self.param_groups:
            a, b = self.mixture(group)
            if (a, b) == (1.0, 0.0):
                continue
            params = [p for p in group["params"] if p.grad is not None]
            reference.mix([_gradient(p) for p in params], [self._first_gradients.get(p) for p in params], a, b)

    def _base_step(self, overflow: Tensor) -> None:
        base = self.base_optimizer
        if isinstance(base, SGD):
            for group in self.param_groups:
                # torch's fused SGD does not know DTensors; FSDP2 under accelerate puts them in after construction.
                if group["fused"] and any(isinstance(p, DTensor) for p in group["params"]):
                    group["fused"] = False
        if all(group.get("fused") for group in self.param_groups):
            # torch's fused kernels read the flag on the device (the contract of torch.amp): no host sync.
            base.found_inf = overflow.float()  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.found_inf  # type: ignore[attr-defined]
        elif not overflow.item():
            base.step()

    def _create_state(self) -> None:
        """``step(None)``: create the base optimizer's state without moving anything.

        torch.distributed.checkpoint does this with zero gradients before it saves or loads.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(bool(local_shard(p.grad).any()) for p in params):
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() was called without a closure while there are gradients. {name} needs two passes: call "
                "step(closure), with a closure that computes the loss and calls backward, or first_step() and "
                "second_step()."
            )
        if self.state or not params:
            return
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        self.base_optimizer.step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].zero_()  # nothing was stepped

    # ---- state ---------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's: one object, so that no round trip can part them."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's, as `param_groups`."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; also checks the group's dtypes and hyper-parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names", range(len(group["params"])))
        for name, p in zip(names, group["params"], strict=True):
            if p.dtype not in _DTYPES:
                raise TypeError(
                    f"{type(self).__name__}: parameter {name!r} is {p.dtype}; supported are float32, bfloat16, float16 "
                    "and float64 (float64 not with the kernels). Leave it out of the param groups or convert it."
                )
        self.check_group(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: the base optimizer's state, and the groups with this method's hyper-parameters.

        Raises:
            RuntimeError: while the weights are perturbed, so that no checkpoint can hold them.
        """
        self._require_exact_weights("state_dict")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer, "defaults": self.defaults, "backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by pickle with what __getstate__ gave, and by load_state_dict with new state and param_groups.
        state = dict(state)
        if "base_optimizer" in state:
            self.base_optimizer = state.pop("base_optimizer")
            self._set_transient(state.pop("backend"))
        else:
            self.base_optimizer.__setstate__({key: state.pop(key) for key in ("state", "param_groups")})
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # a plain base optimizer's checkpoint has no sigma

    def _set_transient(self, backend: Backend) -> None:
        """What is never saved: tables, copies, telemetry."""
        operations.require_backend(backend)
        self._backend: Backend = backend
        self._ops: dict[Any, Ops] = {}
        self._copies: dict[Tensor, Tensor] = {}
        self._first_gradients: dict[Tensor, Tensor] = {}
        self._perturbed = None
        self._overflow = None
        self.telemetry: dict[str, Tensor] = {"skipped": torch.zeros(())}

    def _require_exact_weights(self, call: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"{type(self).__name__}.{call}: the weights are perturbed, by an earlier first_step(). Call "
                "second_step() to update or restore() to undo, then go on."
            )

    def _ops_for(self, like: Tensor, slot: object) -> Ops:
        if slot not in self._ops:
            self._ops[slot] = operations.select(self._backend, like.device)
        return self._ops[slot]


def require_nonnegative(method: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number >= 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{method}: {name} is {value}; it must be a finite number >= 0.")


def _as_groups(params: ParamsT) -> list[Any]:
    """The parameters as lists that can be read twice; torch checks the rest."""
    return [
        {**g, "params": list(g["params"])} if isinstance(g, dict) and isinstance(g["params"], Iterator) else g
        for g in params
    ]


def _can_fuse(base_optimizer: BaseOptimizer, groups: list[Any], base_kwargs: dict[str, Any]) -> bool:
    """Whether torch's fused implementation takes these parameters and the user did not choose another."""
    if base_optimizer not in _HAS_FUSED:
        return False
    if base_kwargs.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        return False
    members = [m for g in groups for m in (g["params"] if isinstance(g, dict) else [g])]
    tensors = [m[1] if isinstance(m, tuple) else m for m in members]
    return all(isinstance(t, Tensor) and t.is_floating_point() and t.device.type in ("cpu", "cuda") for t in tensors)


def _buffer(buffers: dict[Tensor, Tensor], key: Tensor, like: Tensor) -> Tensor:
    """The buffer kept for a parameter; a new one at first, or where the model was converted or moved since."""
    buffer = buffers.get(key)
    if buffer is None or (buffer.dtype, buffer.device, buffer.shape) != (like.dtype, like.device, like.shape):
        buffer = buffers[key] = torch.empty_like(like)
    return buffer


def _shards(params: list[Tensor]) -> list[Tensor]:
    """What this process stores of each parameter: a plain Parameter itself, a DTensor's shard as a plain Tensor."""
    return [local_shard(p).detach() if isinstance(p, DTensor) else p for p in params]


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            f"a gradient of shape {tuple(p.grad.shape)} is {p.grad.layout}; sharpness-aware optimizers need dense "
            "gradients (nn.Embedding: sparse=False)."
        )
    return local_shard(p.grad)
