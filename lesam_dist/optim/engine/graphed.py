"""Steps in a CUDA graph: what none can hold is refused, and what one holds fixed does not change unnoticed.

A replay repeats the launches of the captured step on the same memory and runs none of its Python. So whatever the host
decided, and every number that it put into an operator, stays as it was; what the kernels read from device memory does
not.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesam_dist.optim.engine import capturing
from lesam_dist.optim.engine.backend import Ops
from lesam_dist.optim.engine.base_update import SCHEDULED
from lesam_dist.optim.engine.reference import Radius
from lesam_dist.optim.engine.scaling import Scaled
from lesam_dist.optim.engine.vectors import Column, Update, Vector

_NO_NUMBERS = ("params", "param_names", "ascent_step")  # of a param group

Fixed = dict[tuple[int, str], Any]  # by param group and name


class _Captured(NamedTuple):
    """A graph of a step."""

    ops: weakref.ref[Ops]  # dead once the parameters' tables were made anew
    fixed: Fixed


class Graphed(Scaled):
    """What an optimizer does for the graphs that its steps were captured in."""

    _graphs: tuple[_Captured, ...] = ()
    _told_sigma: float | None = None

    def push_scalars(self) -> None:
        """Copy lr, sigma and all other scheduled values to the device, where the kernels read them.

        A step does it by itself. Replaying a CUDA graph runs none of its Python: call this before each replay, on its
        stream. Before the first replay it also tells the kernels where the graph has its gradients: without it a
        replay changes nothing.

        Raises:
            RuntimeError: where something has changed that all captured graphs hold fixed: capture again. Within a
                capture, where it would be replayed with the numbers of now.
        """
        if self._captures():
            raise RuntimeError(
                f"{type(self).__name__}.push_scalars was called while a CUDA graph is captured, so that every replay "
                "would bring back the numbers of now. Call it before each replay."
            )
        self.refresh()
        self._check_graphs()
        update, g, g_hat = self._blank_update()
        self.weights.push(self.base_optimizer, self.radii(), update, g, g_hat)
        self.tell_sigma()

    def scheduled(self) -> set[str]:
        """The settings of a param group that a captured graph follows, as `push_scalars` brings them to the device."""
        read: set[str] = set()
        for group in self.param_groups:
            self.radius(_Watched(group, read))
        if not self.weights.updates(self.base_optimizer):
            return read
        update, _, _ = self._blank_update()
        if update.beside is None and all(coefficient.is_number for coefficient, _ in update.along.terms):
            read |= set(self.of_descent)
        read |= set(SCHEDULED[type(self.base_optimizer)])
        return read if update.beside is None else read - {"lr"}  # by which the part beside is multiplied

    def radii(self) -> list[Radius]:
        """Of each param group; what is maximized is perturbed against the gradient, to where it is lowest."""
        return [
            radius._replace(sigma=-radius.sigma) if group.get("maximize") else radius
            for group, radius in ((group, self.radius(group)) for group in self.param_groups)
        ]

    def tell_sigma(self) -> None:
        """Bring the budget into the telemetry, where the method has one."""
        sigma = self.radius(self.param_groups[0]).sigma
        if math.isfinite(sigma) and (sigma != self._told_sigma or "sigma" not in self.telemetry):
            self._told_sigma, self.telemetry["sigma"] = sigma, torch.tensor(sigma)

    def require_capturable(self) -> None:
        """Raise RuntimeError where the step that begins cannot be captured in the graph that is captured now."""
        name, weights = type(self).__name__, self.weights
        if not self._captures():
            return
        if not weights.rows:
            raise RuntimeError(f"{name}: a CUDA graph is captured before the first step, which makes what it needs.")
        if not all(ops.fuses() for ops in weights.ops):
            raise RuntimeError(
                f"{name}: a CUDA graph is captured, but backend='reference' waits for the gradient's norm and puts "
                "sigma and lr into the operators. Choose backend='triton'; it has no float64."
            )

    def note_capture(self) -> None:
        """Remember what a graph that is captured now holds fixed."""
        if self._captures():
            alive = (graph for graph in self._graphs if graph.ops() is not None)
            self._graphs = (*alive, _Captured(weakref.ref(self.weights.ops[0]), self._fixed()))

    def _captures(self) -> bool:
        first = next((p for group in self.param_groups for p in group["params"]), None)
        return first is not None and capturing.is_capturing(first.device)

    def _check_graphs(self) -> None:
        """Raise RuntimeError where no captured graph would now make the step that the optimizer's settings ask for."""
        if not self._graphs:
            return
        name = type(self).__name__
        own = [graph.fixed for graph in self._graphs if any(graph.ops() is ops for ops in self.weights.ops)]
        if not own:
            raise RuntimeError(
                f"{name}.push_scalars: the parameters, their groups or their state were replaced since the step was "
                "captured, and the graph works on the old ones. Take a step and capture again."
            )
        now = self._fixed()
        changes = [[key for key, old in fixed.items() if not _same(old, now.get(key))] for fixed in own]
        if all(changes):
            key = changes[-1][0]
            raise RuntimeError(
                f"{name}.push_scalars: {key[1]} of param group {key[0]} was {own[-1][key]!r} when the step was "
                f"captured and is {now.get(key)!r} now, which no graph follows. One reads "
                f"{', '.join(sorted(self.scheduled()))} from the device; for anything else capture again."
            )

    def _fixed(self) -> Fixed:
        scheduled = self.scheduled()
        fixed: Fixed = {}
        for index, group in enumerate(self.param_groups):
            fixed |= {(index, k): v for k, v in group.items() if k not in scheduled and k not in _NO_NUMBERS}
            fixed[index, "the need of the first gradient"] = self.needs_first(group)
            fixed[index, "the use of momentum"] = bool(group.get("momentum"))
        fixed[0, "enabled"] = getattr(self, "enabled", True)
        return fixed

    def _blank_update(self) -> tuple[Update, Column, Column]:
        """What the rule descends along, of gradients g and g_hat that are not there: numbers alone mean something."""
        g, g_hat = (Column([[None] * len(rows.params) for rows in self.weights.rows], is_blank=True) for _ in range(2))
        return as_update(self.descend(self.vector(g), self.vector(g_hat))), g, g_hat


def as_update(descent: Vector | Update) -> Update:
    """What a rule's `descend` returned, as an update."""
    return descent if isinstance(descent, Update) else Update(descent)


class _Watched(dict[str, Any]):
    """A param group that notes what is read of it."""

    def __init__(self, group: dict[str, Any], read: set[str]) -> None:
        super().__init__(group)
        self._read = read

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)


def _same(old: Any, new: Any) -> bool:
    """Equal; a tensor is the same as long as it is the same object, which the graph then reads."""
    return old is new or (not isinstance(old, Tensor) and bool(old == new))
