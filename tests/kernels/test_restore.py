"""restore gives back the bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lesam_kernels import perturb, restore
from lesam_kernels.launch_config import CHUNK
from lesam_kernels.restore import _restore_kernel
from tests.kernels.cases import (
    DTYPES,
    EACH_DTYPE,
    F32,
    SIZES,
    Make,
    bits,
    clones,
    nan_like,
    same_bits,
    scalar,
    table_of,
)


def random_bits(numel: int, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Tensor:
    """Every bit pattern: infinities, subnormals, -0, NaNs with payloads, quiet and signalling."""
    integer = torch.int32 if dtype == F32 else torch.int16
    info = torch.iinfo(integer)
    pattern = torch.randint(info.min, info.max + 1, (numel,), generator=rng).to(integer)
    signalling_nan = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}
    pattern[:1] = signalling_nan[dtype]
    return pattern.to(device).view(dtype)


@EACH_DTYPE
@pytest.mark.parametrize("w_layout", ["contiguous", "offset1"])
@pytest.mark.parametrize("copy_layout", ["contiguous", "offset1"])
def test_every_bit_pattern(
    copy_layout: str,
    w_layout: str,
    dtype: torch.dtype,
    make: Make,
    rng: torch.Generator,
    device: torch.device,
) -> None:
    w = [make(n, dtype, w_layout) for n in SIZES]
    copies = [make(n, dtype, copy_layout) for n in SIZES]
    saved = [random_bits(n, dtype, rng, device) for n in SIZES]
    for copy, value in zip(copies, saved, strict=True):
        bits(copy).copy_(bits(value))
    restore(table_of(w, copy=copies, g=w))
    assert same_bits(w, saved)
    assert same_bits(copies, saved)


@EACH_DTYPE
@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, dtype: torch.dtype, make: Make) -> None:
    w, copies = [make(numel, dtype)], [make(numel, dtype)]
    restore(table_of(w, copy=copies, g=w, chunk=CHUNK))
    assert same_bits(w, copies)


@pytest.mark.parametrize("sum_sq", [4.0, 0.0, math.inf, math.nan])
def test_undoes_perturb(sum_sq: float, make: Make, device: torch.device, rng: torch.Generator) -> None:
    sizes = torch.randint(0, 2500, (30,), generator=rng).tolist()
    w, g = ([make(n, DTYPES[i % 3]) for i, n in enumerate(sizes)] for _ in range(2))
    before, copies = clones(w), nan_like(w)
    table = table_of(w, g=[None if i % 7 == 0 else t for i, t in enumerate(g)], copy=copies)
    perturb(table, scalar(sum_sq, w[0]), torch.tensor([[0.3, 0.2, 1e-12]], dtype=torch.float64, device=device))
    restore(table)
    assert same_bits(w, before)


def test_only_what_was_perturbed(make: Make) -> None:
    """Rows without a copy or a first gradient were not; there the copy is anything."""
    w = [make(n, F32) for n in (2100, 5, 33)]
    before, copies = clones(w), nan_like(w)
    restore(table_of(w, g=[None, w[1], w[2]], copy=[copies[0], None, copies[2]]))
    assert same_bits(w, [before[0], before[1], copies[2]])


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_dense_layouts(layout: str, make: Make) -> None:
    w, copies = ([make((5, 7, 3, 11), F32, layout)] for _ in range(2))
    restore(table_of(w, copy=copies, g=w))
    assert torch.equal(w[0], copies[0])


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_restore(count: int, device: torch.device) -> None:
    empty = [torch.zeros(0, device=device) for _ in range(count)]
    restore(table_of(empty, copy=empty, g=empty, device=device))


@EACH_DTYPE
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_nothing_else_is_written(shift: int, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    pad, numel = 32 + shift, 2048 + 333
    buffer = torch.full((numel + 80,), 7.0, dtype=dtype, device=device)
    w, copies = [buffer[pad : pad + numel]], [make(numel, dtype)]
    restore(table_of(w, copy=copies, g=w))
    assert (buffer[:pad] == 7.0).all()
    assert (buffer[pad + numel :] == 7.0).all()


def test_elements_beyond_two_to_the_31(device: torch.device) -> None:
    """Only the last chunk is touched: the rest of the memory is reserved and never used."""
    numel = 2**31 + 2 * CHUNK + 5
    try:
        w, copy = (torch.empty(numel, dtype=torch.float16, device=device) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"no room for two tensors of 4 GiB: {error}")
    w[-CHUNK:] = 1.0
    copy[-5:] = 2.0
    table = table_of([w], copy=[copy], g=[w], chunk=CHUNK)
    with table.device_guard():
        _restore_kernel[(1,)](
            *(table.column(name) for name in ("w", "copy", "g")),
            table.rows,
            table.blocks,
            table.num_blocks - 1,
            **table.segments[0].constants,
        )
    assert (w[-5:] == 2.0).all()
    assert (w[-CHUNK:-5] == 1.0).all()


def test_autograd_notices_the_write(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (w * w).sum()  # saves w
    copies = [torch.zeros(3, device=device)]
    restore(table_of([w], copy=copies, g=copies))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("column", ["g", "copy"])
def test_needs_the_columns_that_it_reads(column: str, device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table = table_of(w, copy=w, g=w)
    table.clear(column)
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        restore(table)
