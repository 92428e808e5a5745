"""Access 16 bytes at a time only where all of a row is aligned: a GPU would fault, a CPU does not."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, perturb, restore, sum_sq

Make = Callable[..., Tensor]
NUMEL = 2048 + 21


@pytest.fixture
def vector_counts(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
    """Collects what `vectorised` answers to the kernels; the interpreter calls it as a Python function."""
    if device.type == "cuda":
        pytest.skip("watches the interpreter")
    counts: list[int] = []
    for name in ("norm", "perturb", "restore"):
        module = sys.modules[f"lesam_kernels.{name}"]

        def spy(addresses, count, vectorised=module.vectorised):  # type: ignore[no-untyped-def]
            result = vectorised(addresses, count)
            counts.append(int(result.handle.data.item()))
            return result

        monkeypatch.setattr(module, "vectorised", spy)
    return counts


def scalars(sigma: float) -> tuple[Tensor, Tensor]:
    return torch.ones((), dtype=torch.float64), torch.tensor([sigma, 0.2, 0.0], dtype=torch.float64)


LAUNCHES = {
    "sum_sq": (1, sum_sq),
    "perturb-moved": (3, lambda table: perturb(table, *scalars(0.3))),
    "perturb-unmoved": (3, lambda table: perturb(table, *scalars(0.0))),
    "restore": (2, restore),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_every_address_counts(name: str, vector_counts: list[int], device: torch.device, make: Make) -> None:
    num_lists, launch = LAUNCHES[name]
    # Where nothing moves the gradient is not accessed.
    accessed = {0, 2} if name == "perturb-unmoved" else set(range(num_lists))
    for unaligned in (None, *accessed):
        layouts = ["offset1" if i == unaligned else "contiguous" for i in range(num_lists)]
        lists = [[make(NUMEL, torch.float32, layout)] for layout in layouts]
        table = TensorTable(device, chunk=2048)
        table.update(*lists)
        vector_counts.clear()
        launch(table)
        assert vector_counts == ([2048, 16] if unaligned is None else [0, 0])
