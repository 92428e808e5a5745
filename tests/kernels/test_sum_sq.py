"""sum_sq against a float64 sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lesam_kernels import sum_sq
from lesam_kernels.launch_config import CHUNK
from tests.kernels.cases import (
    DTYPES,
    EACH_DTYPE,
    F32,
    SMALL_CHUNK,
    Make,
    Tensors,
    table_of,
)

# The inputs are exact in float32 whatever their dtype. On its way an element passes at most 16 additions (a
# chunk in blocks of 1024) and 12 (the tree over a block) in float32, each of 2**-24 relative: 1.7e-6.
REL = 2e-6


def oracle(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors)


def run(tensors: Sequence[Tensor], chunk: int = SMALL_CHUNK) -> Tensor:
    return sum_sq(table_of(tensors, g=tensors, chunk=chunk), "g")


@EACH_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "offset1"])
@pytest.mark.parametrize("numel", [1, 15, 16, 17, 1021, 2047, 2048, 2049, 3 * 2048, 5003])
def test_one_tensor(numel: int, layout: str, dtype: torch.dtype, make: Make) -> None:
    tensors = [make(numel, dtype, layout)]
    assert run(tensors).item() == pytest.approx(oracle(tensors), rel=REL)


@EACH_DTYPE
@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, dtype: torch.dtype, make: Make) -> None:
    tensors = [make(numel, dtype)]
    assert run(tensors, CHUNK).item() == pytest.approx(oracle(tensors), rel=REL)


def test_long_list_of_mixed_dtypes_and_layouts(make: Make, rng: torch.Generator) -> None:
    sizes = torch.randint(0, 3000, (60,), generator=rng).tolist()
    layouts = ["contiguous", "offset1"]
    tensors = [make(n, DTYPES[i % 3], layouts[i % 2]) for i, n in enumerate(sizes)]
    tensors[30] = tensors[30][:0]
    assert run(tensors).item() == pytest.approx(oracle(tensors), rel=REL)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_dense_layouts(layout: str, make: Make) -> None:
    tensors = [make((5, 7, 3, 11), F32, layout), make((1, 64, 1, 1), F32, layout)]
    assert run(tensors).item() == pytest.approx(oracle(tensors), rel=REL)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_to_sum(count: int, device: torch.device) -> None:
    empty = [torch.zeros(0, device=device) for _ in range(count)]
    result = sum_sq(table_of(empty, g=empty, device=device), "g")
    assert result.item() == 0.0
    assert result.shape == ()
    assert result.dtype == torch.float64
    assert result.device.type == device.type


@pytest.mark.usefixtures("poison")
def test_workspace_is_written_before_it_is_read(make: Make) -> None:
    tensors = [make(n, F32) for n in (1, 2048, 5003)]
    assert run(tensors).item() == pytest.approx(oracle(tensors), rel=REL)


@EACH_DTYPE
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", ["first", "last"])
def test_non_finite_element(position: str, value: float, dtype: torch.dtype, make: Make) -> None:
    tensors = [make(n, dtype) for n in (2049, 16, 4099)]
    tensor, index = (tensors[0], 0) if position == "first" else (tensors[-1], -1)
    tensor[index] = value
    assert not math.isfinite(run(tensors).item())


def test_largest_float16_does_not_overflow(device: torch.device) -> None:
    tensors = [torch.full((4099,), 65504.0, dtype=torch.float16, device=device)]
    assert run(tensors).item() == pytest.approx(4099 * 65504.0**2, rel=REL)


@EACH_DTYPE
def test_bits_depend_on_the_values_alone(dtype: torch.dtype, make: Make) -> None:
    aligned = [make(n, dtype) for n in (2049, 17, 6001)]
    unaligned = [torch.cat([t[:1], t])[1:] for t in aligned]
    first = run(aligned)
    assert all(torch.equal(run(aligned), first) for _ in range(3))
    assert torch.equal(run(unaligned), first)


def test_sum_over_a_partition(make: Make) -> None:
    whole = make(9001, F32)
    parts = [run([part]).item() for part in whole.split([1000, 1, 5000, 3000])]
    assert sum(parts) == pytest.approx(run([whole]).item(), rel=1e-6)


@pytest.mark.parametrize("column", ["g", "g_hat", "g_kept", "ema"])
def test_every_column_of_gradients(column: str, make: Make) -> None:
    w, g = [make(3, F32)], [make(3, F32)]
    assert sum_sq(table_of(w, **{column: g}), column).item() == pytest.approx(oracle(g), rel=REL)


def test_consecutive_sums(device: torch.device) -> None:
    """Results have memory of their own, and the workspace is ready again after each launch."""
    w = [torch.ones(n, device=device) for n in (3, 5000)]
    g_hat = [2 * p for p in w]
    table = table_of(w, g=w, g_hat=g_hat)
    results = [sum_sq(table, column) for column in ("g", "g_hat", "g", "g_hat")]
    assert [r.item() for r in results] == [5003.0, 4 * 5003.0] * 2
    assert table.ticket.item() == 0


# ---- options -----------------------------------------------------------------------------------------------------


class Options:
    """Random tensors for the options of two param groups, and what they mean in float64."""

    def __init__(self, make: Make, dtype: torch.dtype, layout: str = "contiguous") -> None:
        self.sizes, self.groups = (5, 2049, 0, 33, 2048), [0, 1, 0, 1, 0]
        self.w = [make(n, dtype) for n in self.sizes]
        self.g, self.ema = ([make(n, dtype, layout) for n in self.sizes] for _ in range(2))
        like = self.w[0]
        self.metric = torch.tensor([[1.0, 0.01], [0.5, 2.0]], device=like.device)
        self.ema_scale = torch.tensor([0.9, -0.3], device=like.device)

    def given(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in names}

    def expected(self, names: Sequence[str]) -> list[Tensor]:
        """T * v of each tensor."""
        result = []
        for w, g, ema, group in zip(self.w, self.g, self.ema, self.groups, strict=True):
            v = g.double()
            if "ema_scale" in names:
                v = v - self.ema_scale[group].double() * ema.double()
            if "metric" in names:
                p, q = self.metric[group].double()
                v = v * (p * w.double().abs() + q)
            result.append(v)
        return result


@EACH_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "offset1"])
@pytest.mark.parametrize("names", [("metric",), ("ema_scale",), ("metric", "ema_scale")], ids="-".join)
def test_options(names: Sequence[str], layout: str, dtype: torch.dtype, make: Make) -> None:
    o = Options(make, dtype, layout)
    table = table_of(o.w, groups=o.groups, g=o.g, ema=o.ema)
    # The options' arithmetic rounds a few times more.
    assert sum_sq(table, "g", **o.given(names)).item() == pytest.approx(oracle(o.expected(names)), rel=2 * REL)


def test_options_over_mixed_dtypes(make: Make) -> None:
    """One launch reads each row in its own dtype."""
    names = ("metric", "ema_scale")
    parts = [Options(make, dtype) for dtype in DTYPES]
    w, g, ema = ([t for o in parts for t in getattr(o, name)] for name in ("w", "g", "ema"))
    table = table_of(w, groups=[i for o in parts for i in o.groups], g=g, ema=ema)
    expected = sum(oracle(o.expected(names)) for o in parts)
    assert sum_sq(table, "g", **parts[0].given(names)).item() == pytest.approx(expected, rel=2 * REL)


def test_neutral_options_change_nothing(make: Make, device: torch.device) -> None:
    """Of small whole numbers, whose squares have an exact sum in any order."""
    w, g = [make(5003, F32)], [(4 * make(5003, F32)).round()]
    table = table_of(w, g=g, ema=g)
    plain = sum_sq(table, "g")
    neutral = {
        "metric": torch.tensor([[0.0, 1.0]], device=device),
        "ema_scale": torch.zeros(1, device=device),
    }
    for name, value in neutral.items():
        arguments: dict[str, Any] = {name: value}
        assert torch.equal(sum_sq(table, "g", **arguments), plain)


def test_perturbed_only(device: torch.device) -> None:
    """Rows without a copy are left out of the norm; rows without a gradient count nothing in any case."""
    w = [torch.ones(n, device=device) for n in (2, 4000, 8)]
    g: Tensors = [w[0], w[1], None]
    table = table_of(w, g=g, copy=[w[0], None, w[2]])
    assert sum_sq(table, "g").item() == 4002.0
    assert sum_sq(table, "g", perturbed_only=True).item() == 2.0


# ---- what it refuses ---------------------------------------------------------------------------------------------


def test_takes_gradients(device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    with pytest.raises(ValueError, match="takes a column of gradients"):
        sum_sq(table_of(w), "w")


def test_needs_the_columns_that_it_reads(device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table, scale = table_of(w, g=w), torch.ones(1, device=device)
    with pytest.raises(ValueError, match="no column 'ema'"):
        sum_sq(table, "g", ema_scale=scale)
    with pytest.raises(ValueError, match="no column 'copy'"):
        sum_sq(table, "g", perturbed_only=True)
    table.set("ema", [None])
    with pytest.raises(ValueError, match="parameter 0 has a tensor in column 'g' but none in 'ema'"):
        sum_sq(table, "g", ema_scale=scale)


def test_checks_the_options(device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table = table_of(w, groups=[1], g=w, ema=w)
    one = torch.ones(2, device=device)
    with pytest.raises(ValueError, match=r"metric has shape \(2,\) .* of shape \(2, 2\)"):
        sum_sq(table, "g", metric=one)
    with pytest.raises(TypeError, match=r"ema_scale is torch\.float64; it must be torch\.float32"):
        sum_sq(table, "g", ema_scale=one.double())
    with pytest.raises(ValueError, match=r"ema_scale .* 'meta'"):
        sum_sq(table, "g", ema_scale=torch.ones(2, device="meta"))


def test_a_thousand_tensors(make: Make) -> None:
    """Longer than any list that a launch's arguments could hold: 4 KiB, which is 512 addresses."""
    tensors = [make(1 + i % 7, F32) for i in range(1000)]
    assert run(tensors).item() == pytest.approx(oracle(tensors), rel=REL)
