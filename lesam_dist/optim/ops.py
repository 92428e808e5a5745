"""Chooses who does the maths: `reference` (plain torch) or the Triton kernels. The only importer of lesam_kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor

from lesam_dist.optim import reference
from lesam_dist.optim.reference import Radius

if TYPE_CHECKING:
    from lesam_kernels import TensorTable

Backend = Literal["auto", "reference", "triton"]


class Ops(Protocol):
    """What a sharpness-aware step needs done to one list of tensors; `reference` documents each function.

    An instance serves one list (the same tensors, in the same order, step after step) and may cache for it.
    """

    def sum_sq(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def perturb(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        copies: Sequence[Tensor],
        sum_sq: Tensor,
        radius: Radius,
    ) -> Tensor: ...

    def restore(self, params: Sequence[Tensor], copies: Sequence[Tensor]) -> None: ...


class TritonOps:
    """The kernels with their pointer tables, which live and die with the optimizer that owns this object."""

    def __init__(self, device: torch.device) -> None:
        import lesam_kernels  # here, so that triton is needed only where it is used

        self._kernels = lesam_kernels
        self._device = device
        self._tables: dict[str, TensorTable] = {}
        self._radius: tuple[Radius, Tensor] | None = None

    def sum_sq(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._kernels.sum_sq(self._table("sum_sq", tensors))

    def perturb(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        copies: Sequence[Tensor],
        sum_sq: Tensor,
        radius: Radius,
    ) -> Tensor:
        table = self._table("perturb", params, grads, copies)
        return self._kernels.perturb(table, sum_sq, self._on_device(radius))

    def restore(self, params: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self._kernels.restore(self._table("restore", params, copies))

    def _table(self, name: str, *lists: Sequence[Tensor]) -> TensorTable:
        if name not in self._tables:
            self._tables[name] = self._kernels.TensorTable(self._device)
        self._tables[name].update(*lists)
        return self._tables[name]

    def _on_device(self, radius: Radius) -> Tensor:
        if self._radius is None or self._radius[0] != radius:
            # From pinned memory the copy does not wait for the device.
            values = torch.tensor(radius, dtype=torch.float64, pin_memory=self._device.type == "cuda")
            self._radius = radius, values.to(self._device, non_blocking=True)
        return self._radius[1]


def select(backend: Backend, device: torch.device) -> Ops:
    """The operations for ``device``: "auto" is Triton on CUDA where it is installed, the reference elsewhere.

    Raises:
        RuntimeError: for "triton" on a device that it cannot run on.
    """
    if backend == "auto":
        has_triton = importlib.util.find_spec("triton") is not None
        backend = "triton" if device.type == "cuda" and has_triton else "reference"
    if backend == "reference":
        return reference
    if device.type != "cuda":
        _require_interpreter(device)
    return TritonOps(device)


def require_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(get_args(Backend))}.")


def _require_interpreter(device: torch.device) -> None:
    import triton

    if not (device.type == "cpu" and triton.knobs.runtime.interpret):
        raise RuntimeError(
            f"backend='triton' was chosen but the parameters are on '{device}'. Move the model to CUDA, choose "
            "backend='auto', or set TRITON_INTERPRET=1 before the first import to debug the kernels on the CPU."
        )
