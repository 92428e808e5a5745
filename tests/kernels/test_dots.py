"""dots against float64 inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lesam_kernels import dots
from lesam_kernels.launch_config import CHUNK
from tests.kernels.cases import DTYPES, EACH_DTYPE, F32, SIZES, SMALL_CHUNK, Make, Tensors, table_of

# As in test_sum_sq; of the sum of the products' sizes, since they may cancel.
REL = 2e-6


def oracle(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    x, y = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (a, b))
    return [float(x @ y), float(x @ x), float(y @ y)]


def check(actual: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert (actual.shape, actual.dtype) == ((3,), torch.float64)
    expected = oracle(a, b)
    size = sum(float((x.double() * y.double()).abs().sum()) for x, y in zip(a, b, strict=True))
    for value, wanted, scale in zip(actual.tolist(), expected, (size, *expected[1:]), strict=True):
        assert value == pytest.approx(wanted, rel=0, abs=REL * scale)


@EACH_DTYPE
@pytest.mark.parametrize("layouts", [("contiguous", "contiguous"), ("contiguous", "offset1"), ("offset1", "offset1")])
def test_many_tensors(layouts: tuple[str, str], dtype: torch.dtype, make: Make) -> None:
    a, b = ([make(n, dtype, layout) for n in SIZES] for layout in layouts)
    check(dots(table_of(a, g=a, g_hat=b), "g", "g_hat"), a, b)


@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, make: Make) -> None:
    a, b = [make(numel, F32)], [make(numel, F32)]
    check(dots(table_of(a, g=a, g_hat=b, chunk=CHUNK), "g", "g_hat"), a, b)


def test_mixed_dtypes_in_one_launch(make: Make) -> None:
    a, b = ([make(n, DTYPES[i % 3]) for i, n in enumerate((5, 2049, 33, 4097))] for _ in range(2))
    check(dots(table_of(a, g=a, g_kept=b), "g_kept", "g"), b, a)


def test_rows_without_one_of_both_count_nothing(device: torch.device) -> None:
    w = [torch.ones(n, device=device) for n in (2, 4000, 8, 16)]
    a: Tensors = [w[0], None, w[2], None]
    b: Tensors = [w[0], w[1], None, None]
    assert dots(table_of(w, g=a, g_hat=b), "g", "g_hat").tolist() == [2.0, 2.0, 2.0]
    assert dots(table_of([], g=[], g_hat=[], device=device), "g", "g_hat").tolist() == [0.0, 0.0, 0.0]


@pytest.mark.usefixtures("poison")
def test_workspace_is_written_before_it_is_read(make: Make) -> None:
    a, b = ([make(n, F32) for n in (1, 2048, 5003)] for _ in range(2))
    check(dots(table_of(a, g=a, g_hat=b), "g", "g_hat"), a, b)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("index", [0, -1])
def test_non_finite_element(index: int, value: float, make: Make) -> None:
    a, b = ([make(n, F32) for n in (2049, 16, 4099)] for _ in range(2))
    a[index][index] = value
    inner, of_a, of_b = dots(table_of(a, g=a, g_hat=b), "g", "g_hat").tolist()
    assert not math.isfinite(inner)
    assert not math.isfinite(of_a)
    assert math.isfinite(of_b)


def test_bits_depend_on_the_values_alone(make: Make) -> None:
    a, b = ([make(n, F32) for n in (2049, 17, 6001)] for _ in range(2))
    moved = [torch.cat([t[:1], t])[1:] for t in b]
    first = dots(table_of(a, g=a, g_hat=b), "g", "g_hat")
    table = table_of(a, g=a, g_hat=b)
    assert all(torch.equal(dots(table, "g", "g_hat"), first) for _ in range(3))
    assert torch.equal(dots(table_of(a, g=a, g_hat=moved), "g", "g_hat"), first)
    assert table.ticket.item() == 0


def test_what_it_refuses(device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table = table_of(w, g=w, chunk=SMALL_CHUNK)
    with pytest.raises(ValueError, match=r"columns of gradients.*'w'"):
        dots(table, "g", "w")
    with pytest.raises(ValueError, match="no column 'g_kept'"):
        dots(table, "g", "g_kept")
