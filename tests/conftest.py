"""Before anything imports triton: without a GPU the kernels run in Triton's interpreter (read once, at decoration)."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def seed() -> int:
    """A fresh seed per test, printed so that a failure can be repeated with SEED=n."""
    value = int(os.environ.get("SEED", torch.seed() % 2**31))
    torch.manual_seed(value)
    print(f"SEED={value}")
    return value
