"""Shared by the kernel tests: sizes, dtypes, tables over lists of tensors, bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable

Make = Callable[..., Tensor]
Tensors = Sequence[Tensor | None]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

SMALL_CHUNK = 2048
SIZES = (1, 15, 2047, 0, 2048, 2049, 5003)


def table_of(
    w: Sequence[Tensor],
    *,
    groups: Sequence[int] | None = None,
    chunk: int = SMALL_CHUNK,
    device: torch.device | None = None,
    **columns: Tensors,
) -> TensorTable:
    """A table over the parameters ``w`` with these columns."""
    device = device or w[0].device
    table = TensorTable(device, chunk=chunk)
    table.build(w, [0] * len(w) if groups is None else groups)
    for name, tensors in columns.items():
        table.set(name, tensors)
    return table


def nan_like(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What a copy or a buffer is before its first use: memory with anything in it."""
    return [torch.full_like(t, math.nan) for t in tensors]


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == F32 else torch.int16)


def same_bits(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def scalar(value: float, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=like.device)
