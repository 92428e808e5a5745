"""The two-pass protocol that every sharpness-aware optimizer shares: order of passes, gradients, telemetry.

No maths here (`reference` and the kernels have it) and no knowledge of how a pass is made (the closure has it).
A method is a subclass that names its rule: how the radius follows from the norm, and how both gradients mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim.optimizer import ParamsT

from lesam_dist.optim import ops as operations
from lesam_dist.optim import reference
from lesam_dist.optim.base_update import Mixture, base_update
from lesam_dist.optim.ops import Backend, Ops
from lesam_dist.optim.reference import Radius
from lesam_dist.optim.rows import Gradients, RowCache, Rows
from lesam_dist.optim.shared import BaseOptimizer, SharedOptimizer
from lesam_dist.parallel import local_shard, reduce_max, reduce_over_shards

Closure = Callable[..., Any]
Scope = Literal["global", "local"]


class SharpnessAware(SharedOptimizer):
    """A torch optimizer that takes its gradient at perturbed weights and updates the exact ones.

    ``step(closure)`` makes both passes; ``first_step`` and ``second_step`` are for hand-written loops. The update is
    that of ``base_optimizer``, a real torch optimizer that shares ``param_groups`` and ``state`` with this one. On the
    kernels, SGD's and AdamW's updates are made in the launch that restores the weights.

    ``telemetry`` maps names to 0-d tensors, which live on the parameters' device and cost nothing until read:
    ``grad_norm`` and ``rho`` of the last perturbation, ``sigma`` where the method has a budget, ``skipped`` (updates
    left out so far because a gradient was not finite) and, after ``step``, ``loss`` and ``perturbed_loss``. With
    several param groups of different settings, ``rho`` and ``sigma`` are those of the first one.

    With float16, set the attribute `grad_scaler` and let the closure scale the loss; ``step(closure)`` or
    ``scaler.step(optimizer, closure)``, then ``scaler.update()``. In a hand-written loop, call
    ``scaler.unscale_(optimizer)`` before `first_step` and ``scaler.unscale_(optimizer.base_optimizer)`` before
    `second_step`.

    Args:
        params: parameters or param groups. ``perturb=False`` in a group leaves it out of norm and perturbation.
        base_optimizer: class (or function) that builds the base optimizer from the groups and ``base_kwargs``.
        defaults: the method's own hyper-parameters, kept in every param group.
        backend: "auto", "reference" or "triton", see `lesam_dist.optim.ops.select`.
        scope: "global" perturbs by the gradient averaged over all processes. "local", under DDP alone, calls
            ``closure(sync=False)`` first and perturbs each process by its own gradient (m-sharpness, SAM's original
            form); it saves one of the two gradient reductions. A local gradient is noisier, so its norm is larger and
            LE-SAM's radius smaller: sigma must be tuned anew.
        check_second: also leave the update out where a *second* gradient is not finite. Costs one more read of the
            gradients, and one more scalar all-reduce where they are sharded.
        static_grads: keep the gradients' buffers between passes and zero them in place, as a CUDA graph needs.
        base_kwargs: for ``base_optimizer``. torch's fused implementation of SGD, Adam and AdamW is used unless
            ``fused`` or ``foreach`` says otherwise.

    Raises:
        TypeError: for a parameter of an unsupported dtype.
        ValueError: for a hyper-parameter out of range.
    """

    # What GradScaler.step asks for: it then calls step() whatever it found, and leaves the skipping to it.
    _step_supports_amp_scaling = True
    _grad_scaler: GradScaler | None = None

    telemetry: dict[str, Tensor]
    _rows: list[Rows]
    _ops: list[Ops]  # of each of the rows
    _perturbed: list[Ops] | None  # those whose rows are perturbed; None outside of a step
    _overflow: Tensor  # 0-d, 1 where a gradient of this step is not finite

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        defaults: dict[str, Any],
        *,
        backend: Backend = "auto",
        scope: Scope = "global",
        check_second: bool = True,
        static_grads: bool = False,
        **base_kwargs: Any,
    ) -> None:
        operations.require_backend(backend)
        if scope not in get_args(Scope):
            raise ValueError(f"scope is {scope!r}; choose one of {', '.join(get_args(Scope))}.")
        self._options: dict[str, Any] = {
            "backend": backend,
            "scope": scope,
            "check_second": check_second,
            "static_grads": static_grads,
        }
        self.forget()
        self.telemetry = {"skipped": torch.zeros(())}
        super().__init__(params, base_optimizer, {"perturb": True, **defaults}, **base_kwargs)

    # ---- the rule of a method ------------------------------------------------------------------------------------

    def radius(self, group: dict[str, Any]) -> Radius:
        """How this group's radius follows from the gradient norm, with the hyper-parameters of this step."""
        raise NotImplementedError

    def mixture(self, group: dict[str, Any]) -> Mixture:
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
        scaler = self._scaler()
        self._zero_grad()
        with torch.enable_grad():
            loss = closure(sync=False) if self._options["scope"] == "local" else closure()
        if scaler is not None:
            scaler.unscale_(self)
        try:
            self.first_step(zero_grad=True)
            with torch.enable_grad():
                perturbed_loss = closure()
        except BaseException:
            self.restore()
            raise
        if scaler is not None:
            # The scaler allows one unscaling per optimizer and step, and combines what it finds for both.
            scaler.unscale_(self.base_optimizer)
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
        self._refresh_rows()
        self._perturbed = []
        radii = [self.radius(group) for group in self.param_groups]
        grads = [rows.gradients() for rows in self._rows]
        self._keep_first_gradients(grads)
        sum_sq = self._sum([ops.sum_sq_first(g) for ops, g in zip(self._ops, grads, strict=True)])
        for index, (rows, ops) in enumerate(self._pairs()):
            stats = ops.perturb(grads[index], sum_sq.to(rows.device), radii)
            self._perturbed.append(ops)
            if index == 0:
                self._record(stats, radii[0])
        if zero_grad:
            self._zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the exact weights and update them, with the gradients of the second pass in ``.grad``.

        The update is left out, on every rank, where a gradient is not finite.

        Raises:
            RuntimeError: if `first_step` was not called.
        """
        if self._perturbed is None:
            raise RuntimeError(f"{type(self).__name__}.second_step needs a first_step before it.")
        grads = [rows.gradients() for rows in self._rows]
        if self._options["check_second"]:
            sum_sq = self._sum([ops.sum_sq_second(g) for ops, g in zip(self._ops, grads, strict=True)])
            self._overflow.masked_fill_(~torch.isfinite(sum_sq), 1.0)
        if self._options["scope"] == "local":
            reduce_max(self._overflow)  # each process knows its own first gradient only
        self.telemetry["skipped"].add_(self._overflow)
        fuses = all(ops.fuses() for ops in self._ops)
        update = base_update(self.base_optimizer, self._mixtures()) if fuses else None
        if update is not None:
            for (rows, ops), g in zip(self._pairs(), grads, strict=True):
                ops.restore_and_update(update, g, self._overflow.to(rows.device))
        else:
            self.restore()
            self._base_step(grads)
        self._perturbed = None
        self._opt_called = True  # what torch's LR schedulers ask for
        if zero_grad:
            self._zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the exact weights without an update, e.g. after an exception; harmless when not perturbed."""
        for ops in self._perturbed or ():
            ops.restore()
        self._perturbed = None

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are the perturbed ones: between `first_step` and `second_step` or `restore`."""
        return self._perturbed is not None

    @property
    def grad_scaler(self) -> GradScaler | None:
        """The scaler by which the closure scales the loss before ``backward``; both passes are unscaled here."""
        return self._grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, scaler: GradScaler | None) -> None:
        if scaler is not None and scaler.is_enabled():
            # The scaler makes its scale on first use, and wants it before the first step, when no closure has run.
            scaler.scale(torch.zeros((), device=self.param_groups[0]["params"][0].device))
        self._grad_scaler = scaler

    def _scaler(self) -> GradScaler | None:
        if self._grad_scaler is None and getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step was called by a GradScaler that it does not know, so it cannot unscale "
                "the gradients of its passes. Set optimizer.grad_scaler = scaler once (with accelerate: "
                "optimizer.optimizer.grad_scaler = accelerator.scaler)."
            )
        return self._grad_scaler

    def push_scalars(self) -> None:
        """Copy lr, sigma and all other scheduled values to the device, where the kernels read them.

        A step does it by itself. Replaying a CUDA graph runs none of its Python: call this before each replay.
        """
        self._refresh_rows()
        radii = [self.radius(group) for group in self.param_groups]
        for ops in self._ops:
            ops.push(radii, base_update(self.base_optimizer, self._mixtures()))

    # ---- steps of the protocol -----------------------------------------------------------------------------------

    def _refresh_rows(self) -> None:
        if self._cache.refresh(self.param_groups):
            self._rows = self._cache.rows
            if self._options["scope"] == "local" and any(rows.axes is not None for rows in self._rows):
                raise RuntimeError(
                    f"{type(self).__name__}: scope='local' needs each process to hold all weights, but some are "
                    "sharded: their shards are one copy, which cannot be perturbed in several ways at once. Choose "
                    "scope='global', or DDP."
                )
            self._ops = [operations.select(self._options["backend"], rows) for rows in self._rows]

    def _pairs(self) -> zip[tuple[Rows, Ops]]:
        return zip(self._rows, self._ops, strict=True)

    def _sum(self, parts: list[Tensor]) -> Tensor:
        """One scalar over all rows and shards: a reduction for each set of mesh axes, none for whole tensors."""
        total = None
        for rows, part in zip(self._rows, parts, strict=True):
            reduced = reduce_over_shards(part, rows.axes)
            total = reduced if total is None else total + reduced.to(total.device)
        assert total is not None
        return total

    def _record(self, stats: Tensor, radius: Radius) -> None:
        if self.telemetry["skipped"].device != stats.device:
            self.telemetry["skipped"] = self.telemetry["skipped"].to(stats.device)
        if self._overflow.device != stats.device:
            self._overflow = self._overflow.to(stats.device)
        self._overflow.copy_(stats[2])
        self.telemetry["grad_norm"], self.telemetry["rho"] = stats[0], stats[1]
        if math.isfinite(radius.sigma):
            self.telemetry["sigma"] = torch.tensor(radius.sigma)

    def _keep_first_gradients(self, grads: list[Gradients]) -> None:
        """Save g for groups whose update needs it. Copied: a DDP bucket is overwritten by the second backward."""
        wanted = [b != 0 for _, b in self._mixtures()]
        if not any(wanted):
            return
        for rows, first in zip(self._rows, grads, strict=True):
            for row, g in enumerate(first):
                if g is None or not wanted[rows.groups[row]]:
                    rows.kept[row] = None
                else:
                    kept = rows.kept[row]
                    rows.kept[row] = g.clone() if kept is None else kept.copy_(g)

    def _mixtures(self) -> list[Mixture]:
        return [self.mixture(group) for group in self.param_groups]

    def _base_step(self, grads: list[Gradients]) -> None:
        mixtures = self._mixtures()
        for rows, second in zip(self._rows, grads, strict=True):
            for g_hat, g, index in zip(second, rows.kept, rows.groups, strict=True):
                if g_hat is not None and mixtures[index] != (1.0, 0.0):
                    reference.mix(g_hat, g, *mixtures[index])
        base = self.base_optimizer
        self.unfuse_dtensors()
        if all(group.get("fused") for group in self.param_groups):
            # torch's fused kernels read the flag on the device (the contract of torch.amp): no host sync.
            base.found_inf = self._overflow  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.found_inf  # type: ignore[attr-defined]
        elif not self._overflow.item():
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
        self.unfuse_dtensors()
        self.base_optimizer.step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in self.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].zero_()  # nothing was stepped

    def _zero_grad(self) -> None:
        self.zero_grad(set_to_none=not self._options["static_grads"])

    # ---- state ---------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        self._cache = RowCache()
        self._rows, self._ops, self._perturbed = [], [], None
        self._overflow = torch.zeros(())

    # Each of these would lose the copies, or save perturbed weights.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; not while the weights are perturbed."""
        self._require_exact_weights("add_param_group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, also from a plain base optimizer's; not while the weights are perturbed."""
        self._require_exact_weights("load_state_dict")
        super().load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """As torch's: the base optimizer's state, and the groups with this method's hyper-parameters.

        Raises:
            RuntimeError: while the weights are perturbed, so that no checkpoint can hold them.
        """
        self._require_exact_weights("state_dict")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._require_exact_weights("pickle")
        return {**super().__getstate__(), "_options": self._options, "telemetry": self.telemetry}

    def _require_exact_weights(self, call: str) -> None:
        if self.is_perturbed:
            raise RuntimeError(
                f"{type(self).__name__}.{call}: the weights are perturbed, by an earlier first_step(). Call "
                "second_step() to update or restore() to undo, then go on."
            )


def require_nonnegative(method: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number >= 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{method}: {name} is {value}; it must be a finite number >= 0.")
