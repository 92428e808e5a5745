"""The rule of a method, as its author writes it: where to climb, what to descend along, what to remember.

A method is a subclass of `SharpnessAware`, which has these hooks. They speak of `Vector`s over all parameters, and of
numbers of each param group; what they cost is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lesam_dist.optim.engine import capturing
from lesam_dist.optim.engine.arguments import Argument
from lesam_dist.optim.engine.coefficients import ONE, Coefficient
from lesam_dist.optim.engine.contract import require_loss
from lesam_dist.optim.engine.guarded import GuardedOptimizer
from lesam_dist.optim.engine.products import TwiceDifferentiable
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.registry import Registration, arguments_of
from lesam_dist.optim.engine.vectors import Ascent, Column, Update, Vector
from lesam_dist.parallel.scope import require_scope
from lesam_dist.parallel.shards import local_shard

Closure = Callable[..., Any]
_MOMENTA = ("momentum_buffer", "exp_avg")


class Rule(GuardedOptimizer):
    """The hooks of a method, and what they may ask for.

    A class names itself in its ``class`` line, by the keywords of `Registration`. Its hyper-parameters are the
    keyword arguments of its ``__init__``, which hands them on by name; they are then in every param group.
    """

    registration: ClassVar[Registration]
    group_names: ClassVar[Mapping[str, str]] = {}
    """what a hyper-parameter is called in the param groups, where a base optimizer has another one of its name"""
    group_defaults: ClassVar[Mapping[str, Any]] = {}
    """what a param group holds besides, and may set"""
    of_descent: ClassVar[tuple[str, ...]] = ()
    """what of a param group `descend` alone reads, to make numbers of it: a CUDA graph reads those on the device"""
    counts_steps: ClassVar[bool] = False
    """whether the rule asks for `step_index`"""

    telemetry: dict[str, Tensor]
    _overwritten: Column | None = None  # gradients that the next pass may write into

    def __init_subclass__(cls, name: str = "", **keywords: Any) -> None:
        super().__init_subclass__()
        if name:
            cls.registration = Registration(name, **keywords)

    # ---- what a method overrides ---------------------------------------------------------------------------------

    def radius(self, group: dict[str, Any]) -> Radius:
        """How this group's radius follows from the length of the climb, with the hyper-parameters of this step."""
        raise NotImplementedError

    def climb(self, g: Vector) -> Vector | Ascent:
        """Along what the weights move, after the first gradient; along itself by default."""
        return g

    def look_ahead(self) -> Vector:
        """Along what the weights move before there is a gradient; for methods that register as ``one_pass``."""
        raise NotImplementedError

    def remember_first(self, g: Vector) -> None:
        """Called when the weights were perturbed after a first pass; the second one will overwrite g."""

    def descend(self, g: Vector, g_hat: Vector) -> Vector | Update:
        """Along what the base optimizer steps, after the second gradient; ``g`` is there where `needs_first`."""
        return g_hat

    def remember(self, g: Vector, g_hat: Vector) -> None:
        """Called before the update, whose gradients these are; what it keeps, a skipped step forgets."""

    def needs_first(self, group: dict[str, Any]) -> bool:
        """Whether `descend` or `remember` uses the first gradient of this group, of which a copy is then kept."""
        return type(self).descend is not Rule.descend

    def between(self, g: Vector) -> Vector:
        """Along what a step descends that skips the ascent."""
        return g

    def first_pass(self, closure: Closure, **arguments: Any) -> Any:
        """The pass at the weights, which leaves the first gradients in ``.grad``; returns the loss."""
        return self.run_pass(closure, **arguments)

    def second_pass(self, closure: Closure) -> Any:
        """The pass at the perturbed weights, which leaves the second gradients in ``.grad``; returns the loss."""
        return self.run_pass(closure)

    def owns_passes(self) -> str | None:
        """Why the two-step form cannot be this method, as it makes passes of its own; None where it can."""
        if (interval := self.options.ascent_interval) > 1:
            return f"one step in {interval} makes two passes"
        if (fraction := self.options.ascent_fraction) < 1:
            return f"the first pass takes {fraction} of the batch"
        if self.options.norm_in_backward:  # a scaler's unscaling, unlike other changes in place, cannot be seen
            return "norm_in_backward=True leaves nothing between a backward pass and its norm"
        return None

    def shares_first_gradient(self) -> str | None:
        """Why all processes must have the same first gradient; None where each may perturb by its own."""
        if any(self.needs_first(group) for group in self.param_groups):
            return "its update uses the first gradient, which then differs, so that the processes' weights drift apart"
        if self.memory_names:
            return "what it keeps of the first gradients then differs between processes, and a checkpoint saves one"
        return None

    @classmethod
    def settings_of(cls, name: str, module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the param group of a parameter must say beside the defaults, where the trainer makes the groups.

        Args:
            name: of the parameter in the model, as in ``named_parameters``.
            module: the one that owns it.
            arguments: the method's hyper-parameters as they are given; those left out have their default.
        """
        return {}

    # ---- what a method may ask for -------------------------------------------------------------------------------

    @property
    def overflow(self) -> Tensor:
        """float32 0-d: 1 where a gradient of this step is not finite, which may be known on the device alone."""
        return self.weights.overflow

    @property
    def grad_norm(self) -> Tensor:
        """float64 0-d: the length of the last climb's direction; of the perturbed part of g, where it is g."""
        known = self.telemetry.get("grad_norm")
        return self.overflow.double() if known is None else known  # before the first step

    @property
    def step_index(self) -> int:
        """Steps made so far, counted where something depends on it: with ``ascent_interval``, or by a method's own.

        Raises:
            RuntimeError: while a CUDA graph is captured: what depends on it would be decided once, for all replays.
        """
        if self.weights.rows and capturing.is_capturing(self.weights.rows[0].device):
            raise RuntimeError(
                f"{type(self).__name__}: a CUDA graph is captured, but what a step does depends on its number, which a "
                "replay does not know. Let the model alone be captured (torch.cuda.make_graphed_callables)."
            )
        return int(self.param_groups[0].get("ascent_step", 0))

    def first(self, argument: str) -> Any:
        """A hyper-parameter as the first param group has it, for rules that have one value for all."""
        return self.param_groups[0][self.group_names.get(argument, argument)]

    def per_group(self, argument: str | Callable[[dict[str, Any]], float]) -> Coefficient:
        """A hyper-parameter, or a function of a param group, as a number of each param group to multiply vectors by."""
        if callable(argument):
            return Coefficient(tuple(float(argument(group)) for group in self.param_groups))
        name = self.group_names.get(argument, argument)
        return Coefficient(tuple(float(group[name]) for group in self.param_groups))

    def kept(self, name: str) -> Vector:
        """What was kept under a name of `memory_names`; nothing counts as zero."""
        return self.vector(Column([self._memory.read(name, rows) for rows in self.weights.rows]))

    def keep(self, name: str, value: Vector) -> None:
        """Keep a vector from this step on, unless the step is skipped.

        In `remember_first` a gradient itself is copied, as the second pass may write into its memory.
        """
        overwritten = [] if self._overwritten is None else self._overwritten.in_memory
        live = {t.data_ptr() for row in overwritten for t in row if t is not None}
        for rows, tensors in zip(self.weights.rows, value.column().tensors, strict=True):
            own = [t.clone() if t is not None and t.data_ptr() in live else t for t in tensors] if live else tensors
            self._memory.replace(name, rows, own)

    def keep_average(self, name: str, value: Vector, weight: float) -> None:
        """``kept <- (1 - weight) * kept + weight * value``, the value itself the first time."""
        for rows, tensors in zip(self.weights.rows, value.column().tensors, strict=True):
            self._memory.blend(name, rows, tensors, weight)

    def momentum(self) -> Vector:
        """The base optimizer's first moment, of SGD or Adam's kind; of what is maximized, in the direction of +g."""
        column = Column([[self._moment_of(p) for p in rows.params] for rows in self.weights.rows])
        sign = self.per_group(lambda group: -1.0 if group.get("maximize") else 1.0)
        return self.vector(column) * sign

    def _moment_of(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p, {})
        found = next((state[name] for name in _MOMENTA if state.get(name) is not None), None)
        return None if found is None else local_shard(found).detach()

    def vector(self, column: Column) -> Vector:
        """The vector of a column."""
        return Vector(self.weights, [(ONE, column)])

    def refresh(self) -> None:
        """Bring the rows up to date with the param groups."""
        if self.weights.refresh(self.param_groups):
            require_scope(type(self).__name__, self.options.scope, [p for row in self.weights.rows for p in row.params])

    def run_pass(self, closure: Closure, **arguments: Any) -> Any:
        """Call the closure, with gradients enabled, and refuse what is no loss."""
        with torch.enable_grad():
            loss = closure(**arguments)
        require_loss(type(self).__name__, loss, per_sample=bool(arguments.get("per_sample")))
        return loss

    def gradient(self) -> Vector:
        """What is in ``.grad`` now."""
        self.refresh()
        return self.vector(self.weights.gradients())

    def set_gradient(self, value: Vector) -> None:
        """Put a vector into the tensors that are in ``.grad`` now."""
        self.weights.write(value, self.weights.gradients())

    def gradient_at(self, closure: Closure, direction: Vector, length: float) -> Vector:
        """The gradient at ``w + length * direction``, where the direction has length 1; a copy. One more pass."""
        one = torch.ones((), dtype=torch.float64, device=self.overflow.device)
        self.weights.climb(Ascent(direction, norm_sq=one), [Radius.fixed(length)] * len(self.param_groups))
        self.zero_grads()
        self.run_pass(closure)
        self.weights.restore()
        return self.vector(self.weights.gradients()).copy()

    def hessian_product(self, closure: TwiceDifferentiable, v: Vector) -> Vector:
        """The exact ``H v`` at the weights, by a closure that can; a copy. About three more passes.

        Raises:
            NotTwiceDifferentiableError: the closure's model cannot.
        """
        rows = zip(self.weights.rows, v.column().tensors, strict=True)
        pairs = [pair for row, tensors in rows for pair in zip(row.params, tensors, strict=True)]
        self.zero_grads()
        with torch.enable_grad():
            closure.hessian_product({p: tensor for p, tensor in pairs if tensor is not None})
        return self.vector(self.weights.gradients()).copy()

    # ---- hyper-parameters ----------------------------------------------------------------------------------------

    def arguments(self) -> Mapping[str, Argument]:
        """The hyper-parameters of this method."""
        own: Any = type(self)
        return arguments_of(own)

    def check_group(self, group: dict[str, Any]) -> None:
        for name, argument in self.arguments().items():
            key = self.group_names.get(name, name)
            if key in group:
                argument.check(type(self).__name__, group[key])
