"""Tensors that a method keeps per parameter from step to step, and their way through checkpoints.

They live beside the base optimizer's state, not in it: Adam makes its own state only where a parameter has none, and
a plain optimizer has no use for them. In a `state_dict` they stand with the rest of a parameter's state, as DTensors
where the parameter is one, so that they are resharded with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lesam_dist.optim.engine import capturing
from lesam_dist.optim.engine.rows import Gradients, Rows
from lesam_dist.parallel.shards import local_shard

Groups = list[dict[str, Any]]

ASCENT = "ascent_grad"
"""The first gradient of the last step that made both passes, where the steps between reuse it."""


class Memory:
    """Per-parameter tensors by name, each like its parameter.

    What `replace` and `blend` change is read at once, and kept when the step's update is made: see `commit`.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[Tensor, Tensor]] = {}
        self._pending: dict[str, dict[Tensor, Tensor]] = {}

    def replace(self, name: str, rows: Rows, values: Gradients) -> None:
        """``tensor <- value``; None is zero. The values must not change before the `commit`."""
        own, pending = self._tensors.setdefault(name, {}), self._pending.setdefault(name, {})
        for p, value in zip(rows.params, values, strict=True):
            if value is not None:
                if p not in own:
                    own[p] = _unwritten(p)
                pending[p] = value
            elif p in own:
                pending[p] = torch.zeros_like(local_shard(own[p]))

    def blend(self, name: str, rows: Rows, values: Gradients, weight: float) -> None:
        """``tensor <- (1 - weight) * tensor + weight * value``, the value itself the first time; None is left out."""
        own, pending = self._tensors.setdefault(name, {}), self._pending.setdefault(name, {})
        for p, value in zip(rows.params, values, strict=True):
            if value is None:
                continue
            if p not in own:
                own[p] = _unwritten(p)
            old = pending.get(p, local_shard(own[p]))
            value = value.to(old.dtype)
            is_new = (old == 0) & old.signbit()
            pending[p] = torch.where(is_new, value, old.lerp(value, weight)) + 0.0  # which turns -0 into 0

    @property
    def has_changes(self) -> bool:
        """Whether anything was changed since the last commit."""
        return any(self._pending.values())

    def commit(self, overflow: Tensor) -> None:
        """Keep what was changed since the last commit, unless ``overflow`` (0-d) is set."""
        for name, pending in self._pending.items():
            for p, value in pending.items():
                tensor = local_shard(self._tensors[name][p])
                tensor.copy_(torch.where(overflow.to(tensor.device) != 0, tensor, value))
        self.drop()

    def drop(self) -> None:
        """Forget what was changed since the last commit."""
        self._pending = {}

    def read(self, name: str, rows: Rows) -> Gradients:
        """The shards of the tensors called ``name``, parallel to the rows; None where there is none."""
        own, pending = self._tensors.get(name, {}), self._pending.get(name, {})
        return [pending.get(p, local_shard(own[p]).detach()) if p in own else None for p in rows.params]

    def create(self, name: str, groups: Groups) -> None:
        """Zeros where there is nothing yet: what torch.distributed.checkpoint then loads into."""
        own = self._tensors.setdefault(name, {})
        for group in groups:
            for p in group["params"]:
                if p not in own:
                    own[p] = _unwritten(p)

    def pack(self, state_dict: dict[str, Any], groups: Groups) -> None:
        """Put the tensors into an optimizer's ``state_dict``, with the state of their parameters."""
        index = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        for name, own in self._tensors.items():
            for p, tensor in own.items():
                # A new dict: the one in there is the base optimizer's own.
                state_dict["state"][index[p]] = {**state_dict["state"].get(index[p], {}), name: tensor}

    def unpack(self, names: tuple[str, ...], state: dict[Tensor, Any]) -> None:
        """Take the tensors out of an optimizer's loaded ``state``."""
        for name in names:
            found = {p: own.pop(name) for p, own in state.items() if isinstance(own, dict) and name in own}
            if found:
                self._tensors[name] = found
            else:
                self._tensors.pop(name, None)


def _unwritten(p: Tensor) -> Tensor:
    """A tensor that reads as zero and that `blend` knows as new, wherever it has been: all of it is -0."""
    capturing.refuse_new_state(p.device, "what the method keeps from step to step")
    return torch.full_like(p, -0.0)
