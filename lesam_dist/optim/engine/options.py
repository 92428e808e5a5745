"""The options that every sharpness-aware optimizer shares. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lesam_dist.parallel.scope import Scope

Backend = Literal["auto", "reference", "triton"]
Between = Literal["skip", "reuse"]


@dataclass(frozen=True)
class Options:
    """How the passes of a step are made; checks itself.

    Raises:
        ValueError: for an option out of range, or for two that exclude each other.
    """

    backend: Backend = "auto"
    """who does the optimizer's maths, see `lesam_dist.optim.engine.backend.select`"""
    scope: Scope = "global"
    """what perturbs: the gradient averaged over all processes ("global"), each process's own ("local", under DDP), or
    each replica's own ("replica", under HSDP)"""
    check_second: bool = True
    """leave the update out where a second gradient is not finite, too; costs one more read of the gradients, and one
    more scalar all-reduce where they are sharded"""
    max_grad_norm: float | None = None
    """clip the gradient of the update to this global norm; never the first one, which makes the radius"""
    ascent_fraction: float = 1.0
    """share of the batch, in (0, 1], that the first pass takes; a step costs 1 + ascent_fraction passes"""
    ascent_interval: int = 1
    """make both passes only every k-th step; a step then costs (k + 1) / k passes"""
    ascent_between: Between = "skip"
    """the single pass of the steps between: plain, or perturbed by the last first gradient (one more copy of it)"""
    norm_in_backward: bool = False
    """take both norms while the backward passes go on, so that the step does not wait for them: for large models and
    small batches, see docs/speed.md. Under DDP call `sum_buckets` too. For ``step(closure)``; whoever
    changes a gradient in the closure after backward must not do it through ``.data``"""
    static_grads: bool = False
    """zero the gradients in place between passes instead of freeing them, for what holds their addresses (a CUDA graph
    of the step does not need it); nine more passes over the parameters. Not with make_graphed_callables, whose
    gradients would be added to themselves"""

    def __post_init__(self) -> None:
        choices = {"backend": get_args(Backend), "scope": get_args(Scope), "ascent_between": get_args(Between)}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(valid)}.")
        max_norm, interval = self.max_grad_norm, self.ascent_interval
        if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
            raise ValueError(f"max_grad_norm is {max_norm}; it must be a finite number > 0, or None.")
        if not 0 < self.ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction is {self.ascent_fraction}; it must be in (0, 1].")
        if interval < 1 or interval != int(interval):
            raise ValueError(f"ascent_interval is {interval}; it must be a whole number >= 1.")
        if self.norm_in_backward and not self.check_second and max_norm is None:
            raise ValueError(
                "norm_in_backward takes the norms of both gradients, and with check_second=False nobody needs the "
                "second. Leave one of the two out."
            )
        if self.reuses and self.scope != "global":
            raise ValueError(
                f"ascent_between='reuse' keeps a gradient that a checkpoint saves once, but with scope={self.scope!r} "
                "every process has its own. Choose 'skip', or scope='global'."
            )

    @property
    def reuses(self) -> bool:
        """Whether the steps between are perturbed by the last first gradient."""
        return self.ascent_interval > 1 and self.ascent_between == "reuse"

    def of_first_pass(self) -> dict[str, Any]:
        """What the closure is called with for the first pass."""
        arguments: dict[str, Any] = {}
        if self.scope != "global":
            arguments["sync"] = "replica" if self.scope == "replica" else False
        if self.ascent_fraction < 1:
            arguments["fraction"] = self.ascent_fraction
        return arguments


def split(owner: str, kwargs: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """The options among keyword arguments, and the rest; ``owner`` is named in what `Options` raises."""
    names = {item.name for item in fields(Options)}
    try:
        options = Options(**{name: value for name, value in kwargs.items() if name in names})
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None
    return options, {name: value for name, value in kwargs.items() if name not in names}
