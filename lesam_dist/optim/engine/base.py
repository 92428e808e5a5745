"""The two-pass protocol that every sharpness-aware optimizer shares: order of passes, gradients, telemetry.

No maths here (`reference` and the kernels have it), no rule (the method has it, see `rule`), and no knowledge of how a
pass is made (the closure has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim.optimizer import ParamsT

from lesam_dist.optim.engine.accumulate import GradientSum
from lesam_dist.optim.engine.base_optimizer import BaseOptimizer, require_arguments
from lesam_dist.optim.engine.contract import (
    require_closureless,
    require_no_gradients,
    require_training_mode,
    require_whole_batches,
)
from lesam_dist.optim.engine.eager import eager
from lesam_dist.optim.engine.fused import step_unless
from lesam_dist.optim.engine.graphed import Graphed, as_update
from lesam_dist.optim.engine.memory import ASCENT
from lesam_dist.optim.engine.options import split
from lesam_dist.optim.engine.rule import Closure
from lesam_dist.optim.engine.vectors import Ascent, Column, NotKept, Update, Vector
from lesam_dist.parallel.shards import reduce_max

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["ascend", "ahead", "plain"]
"""Of a step: two passes; one pass, at weights perturbed by what earlier steps left; the base optimizer's own."""

_NEUTRAL = {"scope": "global", "ascent_fraction": 1.0, "ascent_interval": 1}  # options about the first of two passes


class SharpnessAware(Graphed):
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
    False, ``step(closure)`` makes the base optimizer's plain step in one pass, and copies no weights. While a closure
    is called, the attribute `descends` says whether it is for the gradient that the update descends along, which may be
    rounded, or for one that perturbs.

    With float16, set the attribute `grad_scaler` and let the closure scale the loss; ``step(closure)`` or
    ``scaler.step(optimizer, closure)``, then ``scaler.update()``. In a hand-written loop, call
    ``scaler.unscale_(optimizer)`` before `first_step` and ``scaler.unscale_(optimizer.base_optimizer)`` before
    `second_step`; there only with ``scope="global"``, since each process's scaler knows its own gradients. A copy of
    the optimizer has a copy of the scaler: copy both together, ``deepcopy((optimizer, scaler))``, or set it anew.

    With ``maximize=True`` the perturbation goes along -g: maximizing f is minimizing -f, step by step.

    Args:
        params: parameters or param groups. ``perturb=False`` in a group leaves it out of norm and perturbation.
        base_optimizer: class (or function) that builds the base optimizer from the groups and what is left of
            ``kwargs``; or an optimizer of these parameters, whose groups, settings and state then hold.
        kwargs: the method's own hyper-parameters, which are kept in every param group; those of `Options` (``backend``,
            ``scope``, ``max_grad_norm``, ``ascent_interval``, ...); the rest goes to ``base_optimizer``. torch's fused
            implementation of SGD, Adam and AdamW is used unless ``fused`` or ``foreach`` says otherwise.

    With scope "local" or "replica" a first gradient is of fewer samples, so it is noisier, its norm is larger and
    LE-SAM's radius smaller: sigma must be tuned anew. The telemetry is then each process's own, and a method whose
    update or memory needs the first gradient is refused, see `shares_first_gradient`. Under "local" the first pass is
    ``closure(sync=False)``, and one of the two gradient reductions is saved; "replica" needs a model that
    `lesam_dist.parallel.wrap` made HSDP for this scope, calls ``closure(sync="replica")`` and saves the reduction
    between replicas. With ``ascent_fraction`` below 1 the first pass is ``closure(fraction=...)``. Steps that reuse
    the last first gradient perturb by it with the current sigma or rho, and have one loss: ``loss`` and
    ``perturbed_loss`` are both it.

    Raises:
        TypeError: for a parameter of an unsupported dtype, or an argument that nobody has.
        ValueError: for a hyper-parameter or an option out of range, options that exclude each other, or a base
            optimizer whose ``step`` needs a closure (LBFGS), or that has other parameters.
    """

    enabled = True
    measure_rho = False
    descends = True

    _kind: Kind = "plain"  # of the step that has begun
    _first: Column  # its first gradient, where it is kept
    _has_looked = False  # whether the overflow flag is that of this step

    def __new__(cls, *args: Any, **_: Any) -> Self:
        require_arguments(cls, args)  # before Python says less of them
        return super().__new__(cls)

    def __init__(self, params: ParamsT, base_optimizer: BaseOptimizer, **kwargs: Any) -> None:
        name = type(self).__name__
        self.options, rest = split(name, kwargs)
        self._require_two_passes()
        self.telemetry = {"skipped": torch.zeros(())}
        own: dict[str, Any] = {"perturb": True, **self.group_defaults}
        own |= {self.group_names.get(key, key): rest.pop(key) for key in self.arguments() if key in rest}
        if self.options.ascent_interval > 1 or self.memory_names or self.counts_steps:
            own["ascent_step"] = 0  # in the groups, where checkpoints keep it
        super().__init__(params, base_optimizer, own, self.options.backend, **rest)
        require_closureless(name, self.base_optimizer)
        self._require_first_gradient()

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
            Exception: whatever the closure raises. The weights are then the exact ones, the gradients zeroed, nothing
                updated; a GradScaler may be updated or not before the next step.
        """
        if closure is None:
            return self._create_state()
        self._require_exact_weights("step")
        closures = list(closure) if isinstance(closure, Sequence) else [closure]
        if not closures:
            raise ValueError(f"{type(self).__name__}.step got no closure: give it one, or a sequence of at least one.")
        self.known_scaler()  # raises where it is not known
        require_training_mode(type(self).__name__, self.base_optimizer)
        require_whole_batches(type(self).__name__)
        if not self.options.static_grads:
            require_no_gradients(type(self).__name__, self._params())
        self._has_looked = False
        try:
            losses = self._passes(closures)
            self.second_step(zero_grad=True)
            self.tell_scaler()
        except BaseException:
            self.restore()
            self.zero_grads()
            self.tell_scaler_of_failure(self._has_looked)
            raise
        first, second = ([torch.as_tensor(loss).detach() for loss in column] for column in zip(*losses, strict=True))
        self.telemetry["loss"] = first[0] if len(first) == 1 else torch.stack(first).mean()
        self.telemetry["perturbed_loss"] = second[0] if len(second) == 1 else torch.stack(second).mean()
        return losses[0][0] if len(losses) == 1 else self.telemetry["loss"]

    def _passes(self, closures: Sequence[Closure]) -> list[tuple[Any, Any]]:
        """All passes of a step; returns the losses of each closure, and leaves the weights perturbed."""
        self._kind = self.kind_of_step()
        self.require_capturable()
        if len(closures) == 1:
            return [self._passes_of(closures[0], fresh=True)]
        losses = []
        total = GradientSum()
        params = self._params()
        for index, closure in enumerate(closures):
            self.weights.restore()
            losses.append(self._passes_of(closure, fresh=index == 0))
            total.take(params)
        total.give_back(params)
        self.weights.average_first(len(closures))
        return losses

    def _passes_of(self, closure: Closure, fresh: bool) -> tuple[Any, Any]:
        """The passes of one closure up to its second gradient; ``fresh``: the first of this step."""
        self.zero_grads()
        self.descends = self._kind != "ascend"
        if self._kind == "ahead":
            self._climb(None, fresh)
            loss = self.run_pass(closure)
            self.take_scale()
            return loss, loss
        if self._kind == "plain":
            loss = self.run_pass(closure)
            self.take_scale()
            self._stay(fresh)
            return loss, loss
        loss = self.first_pass(closure, **self.options.of_first_pass())
        scale = self.take_scale()
        self._climb(self._gradients(), fresh)
        self.zero_grads()
        self.descends = True
        perturbed_loss = self.second_pass(closure)
        self.take_scale(scale)
        return loss, perturbed_loss

    @eager
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights, with the gradients of the first pass in ``.grad``; not while `enabled` is False.

        A method that perturbs before the gradient is known needs none.

        Raises:
            RuntimeError: if the weights are perturbed already, or for a method or an option that `owns_passes`.
        """
        self._require_exact_weights("first_step")
        name = type(self).__name__
        if reason := self.owns_passes():
            raise RuntimeError(
                f"{name}.first_step: {reason}, which a loop that makes both passes cannot do: call step(closure)."
            )
        require_training_mode(name, self.base_optimizer)
        self._kind = self.kind_of_step()
        self.require_capturable()
        if self._kind == "plain":
            self._stay(fresh=True)
        else:
            self._climb(None if self._kind == "ahead" else self._gradients(), fresh=True)
        if zero_grad:
            self.zero_grads()

    @eager
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the exact weights and update them, with the gradients of the second pass in ``.grad``.

        The update is left out, on every rank, where a gradient is not finite.

        Raises:
            RuntimeError: if `first_step` was not called.
        """
        weights = self.weights
        if not weights.active:
            raise RuntimeError(f"{type(self).__name__}.second_step needs a first_step before it.")
        g_hat = weights.gradients()
        update = self._update(self._first, g_hat, self._check_second(g_hat))
        if self._memory.has_changes:
            self._memory.commit(weights.overflow)
        skipped = self.telemetry["skipped"]  # changed in place: a replayed CUDA graph goes on counting
        if not weights.update(self.base_optimizer, update, self._first, g_hat, skipped):
            skipped.add_(weights.overflow)
            step_unless(self.base_optimizer, weights.overflow)
        if update.beside is not None:
            weights.descend_beside()
        self._first = NotKept()
        # What torch's LR schedulers ask for; the kernels make the base optimizer's step without calling it.
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        if self.enabled and "ascent_step" in self.defaults:
            for group in self.param_groups:
                group["ascent_step"] += 1
        self.note_capture()
        if zero_grad:
            self.zero_grads()

    # ---- steps of the protocol -----------------------------------------------------------------------------------

    def kind_of_step(self) -> Kind:
        """What the step that begins now is."""
        if not self.enabled:
            return "plain"
        if self._is_one_pass():
            return "ahead"
        interval = self.options.ascent_interval
        if interval == 1 or self.step_index % interval == 0:
            return "ascend"
        return "ahead" if self.options.reuses else "plain"

    def _climb(self, grads: Column | None, fresh: bool) -> None:
        """Perturb the weights by ``grads``, or by what earlier steps left, and remember what the rule wants to."""
        if grads is None:
            self.refresh()
        self._require_first_gradient()
        weights = self.weights
        if grads is None:
            self._first = NotKept()
            ahead = self.look_ahead() if self._is_one_pass() else self.climb(self.kept(ASCENT))
            stats = weights.climb(_as_ascent(ahead), self.radii(), fresh)
        else:
            wanted = [self.needs_first(group) for group in self.param_groups]
            self._first = weights.keep_first(grads, wanted, fresh) if any(wanted) else NotKept()
            g = self.vector(grads)
            stats = weights.climb(_as_ascent(self.climb(g)), self.radii(), fresh)
        self._tell(stats)
        if self.measure_rho:
            self.telemetry["realized_rho"] = weights.moved()
        if grads is None:
            return
        if self.options.reuses:
            self.keep(ASCENT, g)
            # Now: the second pass overwrites g, and a copy would cost as much again.
            self._memory.commit(self.overflow)
        self._overwritten = grads
        self.remember_first(g)
        self._overwritten = None

    def _stay(self, fresh: bool) -> None:
        """Begin a plain step, whose gradients are there: nothing is copied or moved."""
        self.refresh()
        self._first = NotKept()
        grads = self.weights.gradients()
        if self.enabled:
            self.weights.write(self.between(self.vector(grads)), grads)
        self._tell(self.weights.stay(fresh))

    def _tell(self, stats: Tensor) -> None:
        self._has_looked = True
        self.telemetry["grad_norm"], self.telemetry["rho"], _ = stats.unbind()
        if self.telemetry["skipped"].device != stats.device:
            self.telemetry["skipped"] = self.telemetry["skipped"].to(stats.device)
        self.tell_sigma()

    def _check_second(self, g_hat: Column) -> Tensor | None:
        """Raise the overflow flag where a gradient is not finite, on any rank, and clip.

        Returns:
            A factor of the second gradients (float64 0-d), where the kernel that makes the update is to clip them.
        """
        weights, max_norm, factor = self.weights, self.options.max_grad_norm, None
        wanted = self.options.check_second or max_norm is not None or weights.loss_scale is not None
        if wanted or self._kind != "ascend":
            sum_sq = weights.check_second(g_hat)
            if self._kind == "plain":
                self.telemetry["grad_norm"] = g_hat.length(sum_sq)
            if max_norm is not None and self._can_scale():
                factor = torch.clamp(max_norm / (g_hat.length(sum_sq) + 1e-6), max=1.0)  # as torch's clip_grad_norm_
            elif max_norm is not None:
                norm = g_hat.length(sum_sq)
                g_hat.unscale()
                clip_grads_with_norm_([p for rows in weights.rows for p in rows.params], max_norm, norm)
                g_hat.sum_sq = None
        if self.options.scope != "global":
            reduce_max(weights.overflow)  # each process knows its own first gradient only
        return factor

    def _can_scale(self) -> bool:
        """Whether the second gradients may be clipped as a factor of the update, and nobody needs the tensors."""
        return type(self).remember is SharpnessAware.remember and self.weights.updates(self.base_optimizer)

    def _update(self, first: Column, g_hat: Column, factor: Tensor | None) -> Update:
        """What the rule descends along; it also remembers what it wants to."""
        second = self.vector(g_hat) if factor is None else self.vector(g_hat) * factor
        if self._kind == "plain":
            return Update(second)
        if not isinstance(first, NotKept):
            self.weights.pair(first, g_hat)
        g = self.vector(first)
        self.remember(g, second)
        return as_update(self.descend(g, second))

    def _gradients(self) -> Column:
        """The current gradients, of rows that are brought up to date with the param groups."""
        self.refresh()
        return self.weights.gradients()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _is_one_pass(self) -> bool:
        registered = getattr(self, "registration", None)
        return registered is not None and registered.one_pass

    def _require_two_passes(self) -> None:
        """Refuse options about the first of two passes for a method that has one."""
        if not self._is_one_pass():
            return
        for option, neutral in _NEUTRAL.items():
            if (value := getattr(self.options, option)) != neutral:
                raise ValueError(
                    f"{type(self).__name__}: {option} is {value!r}, but it has no first pass to change. Leave it at "
                    f"{neutral!r}."
                )
        if not self.options.check_second:
            raise ValueError(f"{type(self).__name__}: check_second is False, but its only gradient must be checked.")

    def _require_first_gradient(self) -> None:
        """Refuse an update that needs a first gradient which the options leave out, or make each process's own.

        Asked in every step too: `LESAM`'s alpha may be scheduled.
        """
        name, scope = type(self).__name__, self.options.scope
        if scope != "global" and (reason := self.shares_first_gradient()):
            raise ValueError(
                f"{name}: scope is {scope!r}, but {reason}. Choose scope='global', or a method that only perturbs by "
                "the first gradient, as SAM does."
            )
        if self.options.reuses and any(self.needs_first(group) for group in self.param_groups):
            raise ValueError(
                f"{name}: its update needs the first gradient of every step, which ascent_between='reuse' leaves out. "
                "Choose ascent_between='skip', or ascent_interval=1."
            )

    def names_in_use(self) -> tuple[str, ...]:
        return (*self.memory_names, ASCENT) if self.options.reuses else self.memory_names

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("options", "telemetry", "enabled", "measure_rho", "_grad_scaler")}
        return {**super().__getstate__(), **own}


def _as_ascent(climb: Vector | Ascent) -> Ascent:
    return climb if isinstance(climb, Ascent) else Ascent(climb)
