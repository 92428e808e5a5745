"""`Ops` on the Triton kernels: one pointer table per list of rows, and the scalars that the kernels read.

Per step on the host: the gradients' addresses are compared with the last ones (twice), and scalars that changed are
copied from pinned memory. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import lesam_kernels
from lesam_dist.optim.engine import capturing
from lesam_dist.optim.engine.base_update import BaseUpdate
from lesam_dist.optim.engine.coefficients import Factors
from lesam_dist.optim.engine.reference import Direction, Radius
from lesam_dist.optim.engine.reference_backend import allocate_copies, moved_sq, require_dense
from lesam_dist.optim.engine.rows import Gradients, Rows
from lesam_dist.parallel.shards import local_shard

_B = 6  # where a row of scalars has the weight of the first gradient


class TritonOps:
    """The kernels over one `Rows`."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._table = lesam_kernels.TensorTable(rows.device)
        self._table.build(rows.shards, rows.groups)
        self._radii = DeviceScalars(rows.device)
        self._metric, self._ema_scale = DeviceScalars(rows.device), DeviceScalars(rows.device)
        self._direction: dict[str, Tensor] = {}  # what norm and perturbation are told beside the gradient
        self._scalars = DeviceScalars(rows.device)
        self._copied: list[bool] = []
        self._empty_steps: list[Tensor] = []
        self._second: Gradients | None = None  # what the table was told of in this step
        self._state_key: tuple[tuple[str, ...], list[bool], list[bool]] = ((), [], [])

    def sum_sq_first(
        self, grads: Gradients, ema: Gradients | None, directions: Sequence[Direction], known: Tensor | None = None
    ) -> Tensor:
        self._take(grads)
        self._direction = {}
        if any((d.p, d.q) != (0.0, 1.0) for d in directions):
            self._direction["metric"] = self._metric.on_device([(d.p, d.q) for d in directions], torch.float32)
        if ema is not None and any(d.ema_scale for d in directions):
            self._table.set("ema", ema)
            scales = self._ema_scale.on_device([(d.ema_scale,) for d in directions], torch.float32)
            self._direction["ema_scale"] = scales.view(-1)
        if known is not None:
            return known
        return lesam_kernels.sum_sq(self._table, "g", perturbed_only=True, **self._direction)

    def stay(self) -> None:
        self._take([None] * len(self._rows.params))

    def sum_sq_second(self, grads: Gradients) -> Tensor:
        self._set("g_hat", grads)
        self._second = grads
        return lesam_kernels.sum_sq(self._table, "g_hat")

    def perturb(
        self,
        sum_sq: Tensor,
        radii: Sequence[Radius],
        keep: bool,
        overflow: Tensor | None,
        fresh: bool,
        times: Tensor | None,
    ) -> Tensor:
        if keep:
            self._table.set("g_kept", self._rows.kept)
        on_device = self._radii.on_device(radii, torch.float64, pushed=True)
        return lesam_kernels.perturb(
            self._table,
            sum_sq,
            on_device if times is None else on_device * times,
            **self._direction,
            keep=keep,
            found_inf=overflow,
            raise_only=not fresh,
        )

    def restore(self) -> None:
        lesam_kernels.restore(self._table)

    def dots_kept(self, grads: Gradients) -> Tensor:
        self._table.set("g_kept", self._rows.kept)
        if self._second is not grads:
            self._set("g_hat", grads)
        return lesam_kernels.dots(self._table, "g_kept", "g_hat")

    def moved_sq(self) -> Tensor:
        return moved_sq(
            self._rows, [row for row, there in enumerate(self._copied) if there and self._rows.perturbed[row]]
        )

    def fuses(self) -> bool:
        return True

    def restore_and_update(
        self,
        update: BaseUpdate,
        grads: Gradients,
        overflow: Tensor,
        factors: Factors,
        sum_sq: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        if self._second is not grads:
            self._set("g_hat", grads)
        self._second = None
        self._set_state(update, grads)
        if any(row[_B] for row in update.scalars):
            self._table.set("g_kept", self._rows.kept)
        elif self._table.has("g_kept"):
            self._table.clear("g_kept")
        kernel = getattr(lesam_kernels, update.kernel)
        scalars = self._scalars.on_device(update.scalars, update.dtype, pushed=True)
        a, b = (self._per_group(f, len(update.scalars)) for f in factors)
        kernel(self._table, scalars, overflow, sum_sq=sum_sq, a_factors=a, b_factors=b, skipped=skipped)
        if self._empty_steps:
            torch._foreach_add_(self._empty_steps, 1 - overflow)

    def _per_group(self, factors: Tensor | None, groups: int) -> Tensor | None:
        return None if factors is None else factors.to(self._rows.device, torch.float64).expand(groups).contiguous()

    def push(self, radii: Sequence[Radius], update: BaseUpdate | None) -> None:
        self._table.upload()
        self._radii.on_device(radii, torch.float64)
        if update is not None:
            self._scalars.on_device(update.scalars, update.dtype)

    def _take(self, grads: Gradients) -> None:
        """Let rows with a first gradient and a copy be those that are perturbed."""
        present = [g is not None for g in grads]
        if present != self._copied:  # copies change only with the set of gradients
            allocate_copies(self._rows, grads)
            self._table.set("copy", self._rows.copies)
            self._copied = present
        self._set("g", grads)

    def _set(self, column: str, grads: Gradients) -> None:
        try:
            self._table.set(column, grads)
        except (RuntimeError, ValueError):
            require_dense([g for g in grads if g is not None])  # has the better message
            raise

    def _set_state(self, update: BaseUpdate, grads: Gradients) -> None:
        """Point the table at the base optimizer's state; needed again only when other rows have gradients."""
        key = (update.columns, update.stateful, [g is not None for g in grads])
        if key == self._state_key:
            return
        rows = self._rows
        states: list[dict[str, Tensor] | None] = [
            update.state_of(p) if g is not None and update.stateful[group] else None
            for p, g, group in zip(rows.params, grads, rows.groups, strict=True)
        ]
        for name in set(self._state_key[0]) - set(update.columns):
            self._table.clear(name)
        for name in update.columns:
            self._table.set(name, [None if state is None else local_shard(state[name]) for state in states])
        # An empty shard has no row, but its step counts: a checkpoint may take it from this rank.
        self._empty_steps = [
            state["step"]
            for shard, state in zip(rows.shards, states, strict=True)
            if state is not None and "step" in state and shard.numel() == 0
        ]
        self._state_key = key


class DeviceScalars:
    """A small table of numbers on the device, copied there only when one changed; the address never does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[tuple[float, ...]] = []
        self._tensor: Tensor | None = None

    def on_device(self, values: Sequence[Sequence[float]], dtype: torch.dtype, pushed: bool = False) -> Tensor:
        """The values as a (rows, columns) tensor.

        While a CUDA graph is captured nothing is copied. With ``pushed``, what changed since is there before the first
        replay, by `TritonOps.push`.

        Raises:
            RuntimeError: where they changed while a graph is captured, and will not be pushed.
        """
        current = [tuple(row) for row in values]
        if self._tensor is None or current != self._values:
            on_cuda = self._device.type == "cuda"
            if capturing.is_capturing(self._device):
                if pushed and self._tensor is not None and len(self._values) == len(current):
                    return self._tensor
                raise RuntimeError(
                    "a number that the kernels read changed while a CUDA graph is captured. Take a step with the same "
                    "settings before the capture."
                )
            # From pinned memory, new each time: torch does not reuse it before the copy ran.
            staged = torch.tensor(current, dtype=dtype, pin_memory=on_cuda)
            if self._tensor is None or (self._tensor.shape, self._tensor.dtype) != (staged.shape, dtype):
                self._tensor = torch.empty_like(staged, device=self._device)
            self._tensor.copy_(staged, non_blocking=True)
            self._values = current
        return self._tensor
