"""Chooses who does the maths: `reference` (plain torch) or the Triton kernels (`triton_backend`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lesam_dist.optim.engine.base_update import BaseUpdate
from lesam_dist.optim.engine.coefficients import Factors
from lesam_dist.optim.engine.options import Backend
from lesam_dist.optim.engine.reference import Direction, Radius
from lesam_dist.optim.engine.rows import Gradients, Rows


class Ops(Protocol):
    """What a sharpness-aware step needs done to its rows; `reference` says what each of it means.

    An object serves one `Rows` and may cache for it. Scalars per param group come as a list over the groups.
    """

    def sum_sq_first(
        self, grads: Gradients, ema: Gradients | None, directions: Sequence[Direction], known: Tensor | None = None
    ) -> Tensor:
        """Take what `perturb` will move along: first gradients, averages of them that some directions read, and what
        each param group makes of both. Returns its squared norm over the perturbed rows, float64 0-d: ``known``, where
        somebody has taken it."""

    def stay(self) -> None:
        """Take it that this step perturbs nothing."""

    def sum_sq_second(self, grads: Gradients) -> Tensor:
        """Sum of squares of the second gradients over all rows, float64 0-d."""

    def perturb(
        self,
        sum_sq: Tensor,
        radii: Sequence[Radius],
        keep: bool,
        overflow: Tensor | None,
        fresh: bool,
        times: Tensor | None,
    ) -> Tensor:
        """Save and perturb the rows that have a direction; float64 (3,): grad_norm, rho, not finite.

        Also, with ``keep``, copy what `sum_sq_first` took into `Rows.kept`, where there is a tensor for it.
        ``overflow`` (float32 0-d) becomes 1 where the norm is not finite, and else 0 if ``fresh``. ``times``, float64
        (3,), multiplies every radius."""

    def restore(self) -> None:
        """Give back the saved weights to the rows that `perturb` touched."""

    def dots_kept(self, grads: Gradients) -> Tensor:
        """``(g . g_hat, g . g, g_hat . g_hat)`` of kept first and of second gradients, where there are both; (3,)."""

    def moved_sq(self) -> Tensor:
        """Sum of squares of w' - w as stored, over the rows that `perturb` touched, float64 0-d."""

    def fuses(self) -> bool:
        """Whether there is a `restore_and_update`."""

    def restore_and_update(
        self,
        update: BaseUpdate,
        grads: Gradients,
        overflow: Tensor,
        factors: Factors,
        sum_sq: Tensor | None,
        skipped: Tensor | None,
    ) -> None:
        """Restore, and make the base optimizer's update with ``grads``.

        Not where ``overflow`` (float32 0-d) is set or ``sum_sq`` (float64 0-d) is not finite: ``overflow`` is then set,
        and ``skipped`` (float32 0-d) counts one more. ``factors``, see `lower`, multiply a and b of the mixture."""

    def push(self, radii: Sequence[Radius], update: BaseUpdate | None) -> None:
        """Copy scheduled values, and what new CUDA graphs need, to where the kernels read them.

        See `SharpnessAware.push_scalars`."""


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
        from lesam_dist.optim.engine.reference_backend import ReferenceOps

        return ReferenceOps(rows)
    if rows.device.type != "cuda":
        require_interpreter(rows.device)
    from lesam_dist.optim.engine.triton_backend import TritonOps  # so that triton is needed only where it is used

    return TritonOps(rows)


def require_interpreter(device: torch.device) -> None:
    """Raise RuntimeError where the kernels cannot run on ``device``, which is not CUDA."""
    import triton

    if not (device.type == "cpu" and triton.knobs.runtime.interpret):
        raise RuntimeError(
            f"backend='triton' was chosen but the parameters are on '{device}'. Move the model to CUDA, choose "
            "backend='auto', or set TRITON_INTERPRET=1 before the first import to debug the kernels on the CPU."
        )
