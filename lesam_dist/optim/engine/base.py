"""The two-pass protocol that every sharpness-aware optimizer shares: order of passes, gradients, telemetry.

No maths here (`reference` and the kernels have it) and no knowledge of how a pass is made (the closure has it).
A method is a subclass that names its rule: how the radius follows from the norm, and how both gradients mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine import backend as backends
from lesam_dist.optim.engine.accumulate import GradientSum
from lesam_dist.optim.engine.backend import Backend
from lesam_dist.optim.engine.base_update import Mixture
from lesam_dist.optim.engine.contract import (
    require_closureless,
    require_loss,
    require_no_gradients,
    require_whole_batches,
)
from lesam_dist.optim.engine.eager import eager
from lesam_dist.optim.engine.fused import step_unless
from lesam_dist.optim.engine.guarded import GuardedOptimizer
from lesam_dist.optim.engine.memory import ASCENT
from lesam_dist.optim.engine.options import Between, check_options
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.registry import Registration
from lesam_dist.optim.engine.rows import Gradients
from lesam_dist.optim.engine.weights import Aim
from lesam_dist.optim.engine.wrapper import BaseOptimizer
from lesam_dist.parallel.scope import Scope, require_scope
from lesam_dist.parallel.shards import reduce_max

Closure = Callable[..., Any]
_UNPERTURBED = Radius(sigma=0.0, rho_max=0.0, eps=0.0)


class SharpnessAware(GuardedOptimizer):
    """A torch optimizer that takes its gradient at perturbed weights and updates the exact ones.

    ``step(closure)`` makes both passes; ``first_step`` and ``second_step`` are for hand-written loops. The update is
    that of ``base_optimizer``, a real torch optimizer that shares ``param_groups`` and ``state`` with this one. On the
    kernels, SGD's and AdamW's updates are made in the launch that restores the weights.

    ``telemetry`` maps names to 0-d tensors, which live on the parameters' device and cost nothing until read:
    ``grad_norm`` and ``rho`` of the last perturbation, ``sigma`` where the method has a budget, ``skipped`` (updates
    left out so far because a gradient was not finite) and, after ``step``, ``loss`` and ``perturbed_loss``. With
    several param groups of different settings, ``rho`` and ``sigma`` are those of the first one. Set the attribute
    `measure_rho` to have also ``realized_rho``, ||w' - w|| as stored: in bfloat16 and float16 weights most of a small
    perturbation is lost to rounding. It costs one more read of weights and copies. While the attribute `enabled` is
    False, ``step(closure)`` makes the base optimizer's plain step in one pass, and copies no weights.

    With float16, set the attribute `grad_scaler` and let the closure scale the loss; ``step(closure)`` or
    ``scaler.step(optimizer, closure)``, then ``scaler.update()``. In a hand-written loop, call
    ``scaler.unscale_(optimizer)`` before `first_step` and ``scaler.unscale_(optimizer.base_optimizer)`` before
    `second_step`; there only with ``scope="global"``, since each process's scaler knows its own gradients. A copy of
    the optimizer has a copy of the scaler: copy both together, ``deepcopy((optimizer, scaler))``, or set it anew.

    With ``maximize=True`` the perturbation goes along -g: maximizing f is minimizing -f, step by step.

    Args:
        params: parameters or param groups. ``perturb=False`` in a group leaves it out of norm and perturbation.
        base_optimizer: class (or function) that builds the base optimizer from the groups and ``base_kwargs``.
        defaults: the method's own hyper-parameters, kept in every param group.
        backend: "auto", "reference" or "triton", see `lesam_dist.optim.engine.backend.select`.
        scope: "global" perturbs by the gradient averaged over all processes. "local", under DDP alone, calls
            ``closure(sync=False)`` first and perturbs each process by its own gradient (m-sharpness, SAM's original
            form); it saves one of the two gradient reductions. "replica", for models that `lesam_dist.parallel.wrap`
            made HSDP for this scope, calls ``closure(sync="replica")`` and perturbs each replica by its own; it saves
            the reduction between replicas. A gradient of fewer samples is noisier, so its norm is larger and LE-SAM's
            radius smaller: sigma must be tuned anew. Both only for a method whose update and memory need no first
            gradient, see `shares_first_gradient`; the telemetry is then each process's own.
        check_second: also leave the update out where a *second* gradient is not finite. Costs one more read of the
            gradients, and one more scalar all-reduce where they are sharded.
        max_grad_norm: clip the second gradient to this global norm before the update, as
            `torch.nn.utils.clip_grad_norm_` does. The first one is never clipped: its norm makes the radius.
        ascent_fraction: share of the batch, in (0, 1], that the first pass takes: below 1 it is called as
            ``closure(fraction=...)``, and a step costs 1 + ascent_fraction passes.
        ascent_interval: only every so many steps make both passes; with ``k`` a step costs (k + 1) / k passes.
        ascent_between: what the steps between do with their single pass. "skip": the base optimizer's plain step.
            "reuse": perturb by the last first gradient, of which a copy is kept (and saved in `state_dict`), with the
            current sigma or rho. Such steps have one loss: ``loss`` and ``perturbed_loss`` are both it.
        static_grads: keep the gradients' buffers between passes and zero them in place, as a CUDA graph needs.
        counts_steps: for methods that depend on `step_index`.
        base_kwargs: for ``base_optimizer``. torch's fused implementation of SGD, Adam and AdamW is used unless
            ``fused`` or ``foreach`` says otherwise.

    Raises:
        TypeError: for a parameter of an unsupported dtype.
        ValueError: for a hyper-parameter out of range, options that exclude each other, or a base optimizer whose
            ``step`` needs a closure (LBFGS).
    """

    enabled = True
    measure_rho = False

    # What GradScaler.step asks for: it then calls step() whatever it found, and leaves the skipping to it.
    _step_supports_amp_scaling = True
    _grad_scaler: GradScaler | None = None

    registration: Registration  # of a class that names itself in its class line
    telemetry: dict[str, Tensor]
    _plain: bool  # this step's update is by its gradient alone

    def __init_subclass__(cls, name: str = "", **keywords: Any) -> None:
        super().__init_subclass__()
        if name:
            cls.registration = Registration(name, **keywords)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: BaseOptimizer,
        defaults: dict[str, Any],
        *,
        backend: Backend = "auto",
        scope: Scope = "global",
        check_second: bool = True,
        max_grad_norm: float | None = None,
        ascent_fraction: float = 1.0,
        ascent_interval: int = 1,
        ascent_between: Between = "skip",
        static_grads: bool = False,
        counts_steps: bool = False,
        **base_kwargs: Any,
    ) -> None:
        backends.require_backend(backend)
        self._options: dict[str, Any] = {
            "scope": scope,
            "check_second": check_second,
            "max_grad_norm": max_grad_norm,
            "ascent_fraction": ascent_fraction,
            "ascent_interval": ascent_interval,
            "ascent_between": ascent_between,
            "static_grads": static_grads,
        }
        check_options(type(self).__name__, self._options)
        self.telemetry = {"skipped": torch.zeros(())}
        own = {"perturb": True, **defaults}
        if ascent_interval > 1 or self.memory_names or counts_steps:
            own["ascent_step"] = 0  # in the groups, where checkpoints keep it
        super().__init__(params, base_optimizer, own, backend, **base_kwargs)
        require_closureless(type(self).__name__, self.base_optimizer)
        self._require_first_gradient()

    # ---- the rule of a method ------------------------------------------------------------------------------------

    @classmethod
    def settings_of(cls, name: str, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the param group of a parameter must say beside the defaults, where the trainer makes the groups.

        Args:
            name: of the parameter in the model, as in ``named_parameters``.
            module: the one that owns it.
            arguments: the method's hyper-parameters as they are given; those left out have their default.
        """
        return {}

    def radius(self, group: dict[str, Any]) -> Radius:
        """How this group's radius follows from the gradient norm, with the hyper-parameters of this step."""
        raise NotImplementedError

    def aim(self, grads: list[Gradients]) -> Aim:
        """Along what the first gradients move the weights; along themselves by default."""
        return Aim(grads)

    def first_pass(self, closure: Closure, **arguments: Any) -> Any:
        """The pass at the weights, which leaves the first gradients in ``.grad``; returns the loss."""
        return self.run_pass(closure, **arguments)

    def second_pass(self, closure: Closure) -> Any:
        """The pass at the perturbed weights, which leaves the second gradients in ``.grad``; returns the loss."""
        return self.run_pass(closure)

    def mixture(self, group: dict[str, Any]) -> Mixture:
        """``(a, b)``: the base optimizer steps with ``a * g_hat + b * g``."""
        return 1.0, 0.0

    def mixture_factors(self, grads: list[Gradients]) -> Tensor | None:
        """Factors of a and b that are known on the device alone, float64 (2,); ``grads`` are the second gradients."""
        return None

    def ascended(self, grads: list[Gradients]) -> None:
        """Called when the weights were perturbed after a first pass, with its gradients, e.g. to average them."""

    def between(self, grads: list[Gradients]) -> None:
        """Called with the gradients of a step that skips the ascent, to change them in place before the update."""

    def owns_passes(self) -> str | None:
        """Why the two-step form cannot be this method, as it makes passes of its own; None where it can."""
        if (interval := self._options["ascent_interval"]) > 1:
            return f"one step in {interval} makes two passes"
        if (fraction := self._options["ascent_fraction"]) < 1:
            return f"the first pass takes {fraction} of the batch"
        return None

    def shares_first_gradient(self) -> str | None:
        """Why all processes must have the same first gradient; None where each may perturb by its own."""
        if any(b != 0 for _, b in self._mixtures()):
            return "its update uses the first gradient, which then differs, so that the processes' weights drift apart"
        if self.memory_names:
            return "what it keeps of the first gradients then differs between processes, and a checkpoint saves one"
        return None

    def updated(self) -> None:
        """Called after the update, for methods that move the weights once more. They must mind `overflow`."""

    @property
    def overflow(self) -> Tensor:
        """float32 0-d: 1 where a gradient of this step is not finite, which may be known on the device alone."""
        return self._perturbation.overflow

    @property
    def step_index(self) -> int:
        """Steps made so far, counted where something depends on it: with ``ascent_interval``, or by a method's own."""
        return int(self.param_groups[0].get("ascent_step", 0))

    # ---- the protocol --------------------------------------------------------------------------------------------

    @eager
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Any:
        """Both passes and the update; gradients are zeroed between and after.

        Args:
            closure: clears nothing, computes the loss, calls ``backward`` and returns the loss. It is called twice,
                at the weights and at the perturbed weights, and must use the same batch. None changes nothing (torch's
                checkpointing calls it so to create the state) and is an error once there are gradients. A sequence
                makes one perturbation for each of its closures and one update with the mean of their gradients
                (m-sharpness): give each a micro-batch, and its mean loss undivided.

        Returns:
            The loss at the unperturbed weights; of a sequence, the mean.

        Raises:
            TypeError: for a closure that returns no loss.
            RuntimeError: where there are gradients already, or accelerate accumulates them over several batches.
            Whatever the closure raises. The weights are then the exact ones, the gradients zeroed, nothing updated.
        """
        if closure is None:
            return self._create_state()
        self._require_exact_weights("step")
        closures = list(closure) if isinstance(closure, Sequence) else [closure]
        if not closures:
            raise ValueError(f"{type(self).__name__}.step got no closure: give it one, or a sequence of at least one.")
        self._scaler()  # raises where it is not known
        require_whole_batches(type(self).__name__)
        if not self._options["static_grads"]:
            require_no_gradients(type(self).__name__, (p for group in self.param_groups for p in group["params"]))
        try:
            losses = self._passes(closures)
            self.second_step(zero_grad=True)
        except BaseException:
            self.restore()
            self.zero_grads()
            raise
        first, second = ([torch.as_tensor(loss).detach() for loss in column] for column in zip(*losses, strict=True))
        self.telemetry["loss"] = first[0] if len(first) == 1 else torch.stack(first).mean()
        self.telemetry["perturbed_loss"] = second[0] if len(second) == 1 else torch.stack(second).mean()
        return losses[0][0] if len(losses) == 1 else self.telemetry["loss"]

    def _passes(self, closures: Sequence[Closure]) -> list[tuple[Any, Any]]:
        """All passes of a step; returns the losses of each closure, and leaves the weights perturbed."""
        if len(closures) == 1:
            return [self._passes_of(closures[0], fresh=True)]
        if self._scaler() is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step got {len(closures)} closures and a GradScaler, which unscales only once a "
                "step. Use bfloat16, or one closure."
            )
        losses = []
        total = GradientSum()
        params = [p for group in self.param_groups for p in group["params"]]
        for index, closure in enumerate(closures):
            self._perturbation.restore()
            losses.append(self._passes_of(closure, fresh=index == 0))
            total.take(params)
        total.give_back(params)
        self._perturbation.average_first(len(closures))
        return losses

    def _passes_of(self, closure: Closure, fresh: bool) -> tuple[Any, Any]:
        """The passes of one closure up to its second gradient; ``fresh``: the first of this step."""
        self.zero_grads()
        if self._is_ascent_step():
            loss = self.first_pass(closure, **self._first_pass_arguments())
            self._unscale(self)
            grads = self.first_gradients()
            self._perturb(grads, fresh=fresh)
            if self._reuses():
                for rows, g in zip(self._perturbation.rows, grads, strict=True):
                    self._memory.replace(ASCENT, rows, g)
                # Now: the second pass overwrites g, and a copy would cost as much again.
                self._memory.commit(self.overflow)
            self.ascended(grads)
            self.zero_grads()
            perturbed_loss = self.second_pass(closure)
            if self._scaler() is not None and self._options["scope"] != "global":
                self._share_overflow()
            # The scaler allows one unscaling per optimizer and step, and combines what it finds for both.
            self._unscale(self.base_optimizer)
            return loss, perturbed_loss
        if self.enabled and self._reuses():
            self._refresh()
            self._perturb([self._memory.read(ASCENT, rows) for rows in self._perturbation.rows], fresh=fresh)
            loss = self.run_pass(closure)
            self._unscale(self)
        else:
            loss = self.run_pass(closure)
            self._unscale(self)
            grads = self.first_gradients()
            if self.enabled:
                self.between(grads)
            self._perturb(grads, fresh=fresh, plain=True)
        return loss, loss

    @eager
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights, with the gradients of the first pass in ``.grad``; not while `enabled` is False.

        Raises:
            RuntimeError: if the weights are perturbed already, or for a method or an option that `owns_passes`.
        """
        self._require_exact_weights("first_step")
        name = type(self).__name__
        if reason := self.owns_passes():
            raise RuntimeError(
                f"{name}.first_step: {reason}, which a loop that makes both passes cannot do: call step(closure)."
            )
        grads = self.first_gradients()
        self._perturb(grads, fresh=True, plain=not self.enabled)
        if self.enabled:
            self.ascended(grads)
        if zero_grad:
            self.zero_grads()

    @eager
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the exact weights and update them, with the gradients of the second pass in ``.grad``.

        The update is left out, on every rank, where a gradient is not finite.

        Raises:
            RuntimeError: if `first_step` was not called.
        """
        weights = self._perturbation
        if not weights.active:
            raise RuntimeError(f"{type(self).__name__}.second_step needs a first_step before it.")
        grads = weights.gradients()
        max_norm = self._options["max_grad_norm"]
        if self._options["check_second"] or max_norm is not None or not self._is_ascent_step():
            norm = weights.check_second(grads)
            if max_norm is not None:
                clip_grads_with_norm_([p for rows in weights.rows for p in rows.params], max_norm, norm)
            if self._plain:
                self.telemetry["grad_norm"] = norm
        if self._options["scope"] != "global":
            reduce_max(weights.overflow)  # each process knows its own first gradient only
        self.telemetry["skipped"].add_(weights.overflow)  # in place: a replayed CUDA graph goes on counting
        factors = None if self._plain else self.mixture_factors(grads)
        self._memory.commit(weights.overflow)
        if not weights.update(self.base_optimizer, grads, factors):
            weights.restore()
            weights.mix(grads, factors)
            step_unless(self.base_optimizer, weights.overflow)
        if not self._plain:
            self.updated()
        # What torch's LR schedulers ask for; the kernels make the base optimizer's step without calling it.
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        if self.enabled and "ascent_step" in self.defaults:
            for group in self.param_groups:
                group["ascent_step"] += 1
        if zero_grad:
            self.zero_grads()

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
        self._refresh()
        self._perturbation.push(self.base_optimizer, self._radii(), self._mixtures())

    # ---- steps of the protocol -----------------------------------------------------------------------------------

    def _is_ascent_step(self) -> bool:
        """Whether this step makes both passes."""
        interval: int = self._options["ascent_interval"]
        return self.enabled and (interval == 1 or self.step_index % interval == 0)

    def _first_pass_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self._options["scope"] != "global":
            arguments["sync"] = "replica" if self._options["scope"] == "replica" else False
        if self._options["ascent_fraction"] < 1:
            arguments["fraction"] = self._options["ascent_fraction"]
        return arguments

    def _reuses(self) -> bool:
        return self._options["ascent_interval"] > 1 and bool(self._options["ascent_between"] == "reuse")

    def run_pass(self, closure: Closure, **arguments: Any) -> Any:
        """Call the closure, with gradients enabled, and refuse what is no loss."""
        with torch.enable_grad():
            loss = closure(**arguments)
        require_loss(type(self).__name__, loss, per_sample=bool(arguments.get("per_sample")))
        return loss

    def _unscale(self, optimizer: Optimizer) -> None:
        if scaler := self._scaler():
            scaler.unscale_(optimizer)

    def _share_overflow(self) -> None:
        """Let the scaler of every process see that one's first gradient was not finite, or their scales part.

        It looks at gradients only, so one is spoilt; this step makes no update anyway.
        """
        overflow = self._perturbation.overflow
        reduce_max(overflow)
        present = (g for grads in self._perturbation.gradients() for g in grads if g is not None and g.numel())
        if (g := next(present, None)) is not None:
            g.div_(1 - overflow.to(g.device))

    def first_gradients(self) -> list[Gradients]:
        """The current gradients of each of the rows, brought up to date with the param groups."""
        self._refresh()
        return self._perturbation.gradients()

    def _refresh(self) -> None:
        if self._perturbation.refresh(self.param_groups):
            params = [p for group in self.param_groups for p in group["params"]]
            require_scope(type(self).__name__, self._options["scope"], params)

    def _perturb(self, grads: list[Gradients], fresh: bool, plain: bool = False) -> None:
        """Perturb by ``grads``; ``plain`` leaves the weights alone, for an update by ``.grad`` alone."""
        if not plain:
            self._require_first_gradient()
        self._plain = plain
        if plain:
            grads = [[None] * len(rows.params) for rows in self._perturbation.rows]  # no copy is made
        radii = [_UNPERTURBED] * len(self.param_groups) if plain else self._radii()
        mixing = [(1.0, 0.0)] * len(radii) if plain else self._mixtures()
        self._perturbation.keep_first(grads, mixing, fresh)
        stats = self._perturbation.perturb(Aim(grads) if plain else self.aim(grads), radii, fresh)
        self.telemetry["grad_norm"], self.telemetry["rho"] = stats[0], stats[1]
        if self.telemetry["skipped"].device != stats.device:
            self.telemetry["skipped"] = self.telemetry["skipped"].to(stats.device)
        if math.isfinite(sigma := self.radius(self.param_groups[0]).sigma):
            self.telemetry["sigma"] = torch.tensor(sigma)
        if self.measure_rho:
            self.telemetry["realized_rho"] = self._perturbation.moved()

    def _radii(self) -> list[Radius]:
        """Of each param group; what is maximized is perturbed against the gradient, to where it is lowest."""
        return [
            radius._replace(sigma=-radius.sigma) if group.get("maximize") else radius
            for group, radius in ((group, self.radius(group)) for group in self.param_groups)
        ]

    def _mixtures(self) -> list[Mixture]:
        return [self.mixture(group) for group in self.param_groups]

    def _require_first_gradient(self) -> None:
        """Refuse an update that needs a first gradient which the options leave out, or make each process's own.

        Asked in every step too: `LESAM`'s alpha may be scheduled.
        """
        name, scope = type(self).__name__, self._options["scope"]
        if scope != "global" and (reason := self.shares_first_gradient()):
            raise ValueError(
                f"{name}: scope is {scope!r}, but {reason}. Choose scope='global', or a method that only perturbs by "
                "the first gradient, as SAM does."
            )
        if self._reuses() and any(b != 0 for _, b in self._mixtures()):
            raise ValueError(
                f"{name}: its update needs the first gradient of every step, which ascent_between='reuse' leaves out. "
                "Choose ascent_between='skip', or ascent_interval=1."
            )

    def names_in_use(self) -> tuple[str, ...]:
        return (*self.memory_names, ASCENT) if self._reuses() else self.memory_names

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name) for name in ("_options", "telemetry", "enabled", "measure_rho", "_grad_scaler")
        }
        return {**super().__getstate__(), **own}

    def zero_grads(self) -> None:
        """Zero all gradients as the options say."""
        self.zero_grad(set_to_none=not self._options["static_grads"])
