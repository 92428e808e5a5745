"""Shared by the kernel tests: sizes, dtypes, tables over lists of tensors, bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lesam_kernels import TensorTable

Make = Callable[..., Tensor]
Tensors = Sequence[Tensor | None]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
ALL_PAIRS = tuple(itertools.product(DTYPES, repeat=2))
# What training meets: gradients of the parameters' dtype, or of float32 or bfloat16.
USED_PAIRS = tuple((w, g) for w, g in ALL_PAIRS if g in (w, F32, BF16))

SMALL_CHUNK = 2048
SIZES = (1, 15, 2047, 0, 2048, 2049, 5003)


def pair_id(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


def table_of(
    w: Sequence[Tensor],
    *,
    groups: Sequence[int] | None = None,
    grad_dtypes: Sequence[torch.dtype] | None = None,
    chunk: int = SMALL_CHUNK,
    device: torch.device | None = None,
    **columns: Tensors,
) -> TensorTable:
    """A table over the parameters ``w`` with these columns; the gradients' dtypes are those of g or g_hat."""
    device = device or w[0].device
    if grad_dtypes is None:
        grads = columns.get("g", columns.get("g_hat", w))
        grad_dtypes = [p.dtype if t is None else t.dtype for p, t in zip(w, grads, strict=True)]
    table = TensorTable(device, chunk=chunk)
    table.build(w, [0] * len(w) if groups is None else groups, grad_dtypes)
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
