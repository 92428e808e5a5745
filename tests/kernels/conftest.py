"""Shared by the kernel tests: the device, random tensors in every memory layout, poisoned workspaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import lesam_kernels  # noqa: F401 (so that its modules can be watched)

if TYPE_CHECKING:  # it needs numpy, which tests on a GPU can do without
    from tests.kernels.memory_spy import MemorySpy

Make = Callable[..., Tensor]


@pytest.fixture
def device() -> torch.device:
    """CUDA where there is one; else the CPU, where Triton interprets the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def make(device: torch.device, rng: torch.Generator) -> Make:
    """make(shape, dtype, layout): a normal random tensor that lies in memory as ``layout`` says.

    "contiguous"; "offset1", one element into its storage and so not aligned to 16 bytes; "channels_last";
    "transposed".
    """

    def make(shape: int | tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        values = torch.randn(shape, generator=rng).to(dtype).to(device)
        if layout == "offset1":
            result = torch.zeros(math.prod(shape) + 1, dtype=dtype, device=device)[1:].view(shape)
            return result.copy_(values)
        if layout == "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        return values

    return make


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> MemorySpy:
    """Watches the memory that interpreted kernels touch."""
    if device.type == "cuda":
        pytest.skip("watches the interpreter")
    from tests.kernels.memory_spy import MemorySpy

    return MemorySpy(monkeypatch)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty returns with NaN, so that reading a workspace before writing it shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = empty(*args, **kwargs)
        return result.fill_(math.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned)
