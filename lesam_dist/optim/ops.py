"""Chooses who does the maths: `reference` (plain torch) or the Triton kernels (`triton_ops`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lesam_dist.optim import reference
from lesam_dist.optim.base_update import BaseUpdate
from lesam_dist.optim.reference import Direction, Radius
from lesam_dist.optim.rows import Gradients, Rows

Backend = Literal["auto", "reference", "triton"]


class Ops(Protocol):
    """What a sharpness-aware step needs done to its rows; `reference` says what each of it means.

    An object serves one `Rows` and may cache for it. Scalars per param group come as a list over the groups.
    """

    def aim(self, grads: Gradients, ema: Gradients | None, directions: Sequence[Direction]) -> Tensor:
        """Choose along what `perturb` moves: first gradients, averages of them that some directions read, and the
        direction of each param group. Its squared norm over the perturbed rows, float64 0-d."""

    def sum_sq_second(self, grads: Gradients) -> Tensor:
        """Sum of squares of the second gradients over all rows, float64 0-d."""

    def perturb(self, sum_sq: Tensor, radii: Sequence[Radius]) -> Tensor:
        """Save and perturb the rows that have a direction; float64 (3,): grad_norm, rho, not finite."""

    def restore(self) -> None:
        """Give back the saved weights to the rows that `perturb` touched."""

    def dots_kept(self, grads: Gradients) -> Tensor:
        """``(g . g_hat, g . g, g_hat . g_hat)`` of kept first and of second gradients, where there are both; (3,)."""

    def moved_sq(self) -> Tensor:
        """Sum of squares of w' - w as stored, over the rows that `perturb` touched, float64 0-d."""

    def fuses(self) -> bool:
        """Whether there is a `restore_and_update`."""

    def restore_and_update(
        self, update: BaseUpdate, grads: Gradients, overflow: Tensor, factors: Tensor | None
    ) -> None:
        """Restore, and unless ``overflow`` (float32 0-d) is set make the base optimizer's update with ``grads``.

        ``factors``, float64 (2,), multiply a and b of the mixture."""

    def push(self, radii: Sequence[Radius], update: BaseUpdate | None) -> None:
        """Copy scheduled values to where the kernels read them; see `SharpnessAware.push_scalars`."""


class ReferenceOps:
    """Plain torch, list by list."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._touched: list[int] = []
        self._aims: Gradients = []

    def aim(self, grads: Gradients, ema: Gradients | None, directions: Sequence[Direction]) -> Tensor:
        rows = self._rows
        require_dense([g for g in grads if g is not None])
        self._aims, scaled = [], []
        for row, g in enumerate(grads):
            if g is None or not rows.perturbed[row]:
                self._aims.append(None)
                continue
            average = ema[row] if ema else None
            scaled_g, along = reference.aim(rows.shards[row], g, average, directions[rows.groups[row]])
            scaled.append(scaled_g)
            self._aims.append(along)
        return self._sum_sq(scaled)

    def sum_sq_second(self, grads: Gradients) -> Tensor:
        return self._sum_sq(grads)

    def perturb(self, sum_sq: Tensor, radii: Sequence[Radius]) -> Tensor:
        rows = self._rows
        by_radius: dict[Radius, list[int]] = {}
        for row in allocate_copies(rows, self._aims):
            by_radius.setdefault(radii[rows.groups[row]], []).append(row)
        stats = None
        for radius, members in by_radius.items():
            shards, along = _take(rows.shards, members), _take(self._aims, members)
            result = reference.perturb(shards, along, _take(rows.copies, members), sum_sq, radius)
            self._touched += members
            stats = result if stats is None else stats
        self._aims = []  # the second pass must not pay for them
        return torch.zeros(3, dtype=torch.float64, device=rows.device) if stats is None else stats

    def restore(self) -> None:
        rows = self._rows
        reference.restore(_take(rows.shards, self._touched), _take(rows.copies, self._touched))
        self._touched = []

    def dots_kept(self, grads: Gradients) -> Tensor:
        pairs = zip(self._rows.kept, grads, strict=True)
        both = [(g, g_hat) for g, g_hat in pairs if g is not None and g_hat is not None]
        if not both:
            return torch.zeros(3, dtype=torch.float64, device=self._rows.device)
        g, g_hat = [pair[0] for pair in both], [pair[1] for pair in both]
        return torch.stack([reference.dot(g, g_hat), reference.sum_sq(g), reference.sum_sq(g_hat)])

    def moved_sq(self) -> Tensor:
        return moved_sq(self._rows, self._touched)

    def fuses(self) -> bool:
        return False

    def restore_and_update(self, *_: object) -> None:
        raise NotImplementedError("the reference restores, then the base optimizer steps by itself")

    def push(self, *_: object) -> None:
        pass

    def _sum_sq(self, grads: Sequence[Tensor | None]) -> Tensor:
        present = [g for g in grads if g is not None]
        require_dense(present)
        if not present:
            return torch.zeros((), dtype=torch.float64, device=self._rows.device)
        return reference.sum_sq(present)


def allocate_copies(rows: Rows, grads: Gradients) -> list[int]:
    """The rows to perturb: those with a first gradient, in a perturbed group. Gives each its buffer for the weights."""
    touched = [row for row, g in enumerate(grads) if g is not None and rows.perturbed[row]]
    for row in touched:
        if rows.copies[row] is None:
            rows.copies[row] = torch.empty_like(rows.shards[row])
    return touched


def moved_sq(rows: Rows, touched: Sequence[int]) -> Tensor:
    """Sum of squares of w' - w over the rows ``touched``, in float64: the difference is exact."""
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for w, copy in zip(_take(rows.shards, touched), _take(rows.copies, touched), strict=True):
        total += reference.sum_sq([w.detach().double() - copy.double()])
    return total


def require_dense(grads: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a sparse gradient."""
    for g in grads:
        if g.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of shape {tuple(g.shape)} is {g.layout}; sharpness-aware optimizers need dense gradients "
                "(nn.Embedding: sparse=False)."
            )


def require_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(get_args(Backend))}.")


def choose(backend: Backend, rows: Rows) -> Backend:
    """What "auto" is for ``rows``: Triton on CUDA where it is installed, but for float64; the reference elsewhere."""
    if backend != "auto":
        return backend
    has_kernels = rows.device.type == "cuda" and all(p.dtype != torch.float64 for p in rows.params)
    return "triton" if has_kernels and importlib.util.find_spec("triton") is not None else "reference"


def select(backend: Backend, rows: Rows) -> Ops:
    """The operations for ``rows``, see `choose`.

    Raises:
        RuntimeError: for "triton" on a device that it cannot run on.
    """
    if choose(backend, rows) == "reference":
        return ReferenceOps(rows)
    if rows.device.type != "cuda":
        require_interpreter(rows.device)
    from lesam_dist.optim.triton_ops import TritonOps  # here, so that triton is needed only where it is used

    return TritonOps(rows)


def require_interpreter(device: torch.device) -> None:
    """Raise RuntimeError where the kernels cannot run on ``device``, which is not CUDA."""
    import triton

    if not (device.type == "cpu" and triton.knobs.runtime.interpret):
        raise RuntimeError(
            f"backend='triton' was chosen but the parameters are on '{device}'. Move the model to CUDA, choose "
            "backend='auto', or set TRITON_INTERPRET=1 before the first import to debug the kernels on the CPU."
        )


def _take(column: Sequence[Tensor | None], rows: Sequence[int]) -> list[Tensor]:
    return [tensor for row in rows if (tensor := column[row]) is not None]
