"""restore gives back the bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, perturb, restore
from lesam_kernels.launch_config import CHUNK, SUPPORTED_DTYPES, TRITON_DTYPES, launch_config
from lesam_kernels.restore import _restore_kernel

Make = Callable[..., Tensor]
SMALL_CHUNK = 2048
SIZES = (1, 15, 2047, 0, 2048, 2049, 5003)
DTYPES = pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def random_bits(numel: int, dtype: torch.dtype, rng: torch.Generator, device: torch.device) -> Tensor:
    """Every bit pattern: infinities, subnormals, -0, NaNs with payloads, quiet and signalling."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    pattern = torch.randint(info.min, info.max + 1, (numel,), generator=rng).to(integer)
    signalling_nan = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}
    pattern[:1] = signalling_nan[dtype]
    return pattern.to(device).view(dtype)


@DTYPES
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
    table = TensorTable(device, chunk=SMALL_CHUNK)
    table.update(w, copies)
    restore(table)
    for tensor in (w, copies):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensor, saved, strict=True))


@DTYPES
@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    w, copy = make(numel, dtype), make(numel, dtype)
    table = TensorTable(device)
    table.update([w], [copy])
    restore(table)
    assert torch.equal(bits(w), bits(copy))


@pytest.mark.parametrize("sum_sq", [4.0, 0.0, math.inf, math.nan])
def test_undoes_perturb(sum_sq: float, make: Make, device: torch.device, rng: torch.Generator) -> None:
    sizes = torch.randint(0, 2500, (60,), generator=rng).tolist()
    w = [make(n, SUPPORTED_DTYPES[i % 3]) for i, n in enumerate(sizes)]
    g = [make(n, SUPPORTED_DTYPES[i % 2]) for i, n in enumerate(sizes)]
    copies = [torch.full_like(t, math.nan) for t in w]
    before = [t.clone() for t in w]
    climb, back = TensorTable(device), TensorTable(device)
    climb.update(w, g, copies)
    back.update(w, copies)
    radius = torch.tensor([0.3, 0.2, 1e-12], dtype=torch.float64, device=device)
    perturb(climb, torch.tensor(sum_sq, dtype=torch.float64, device=device), radius)
    restore(back)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(w, before, strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_dense_layouts(layout: str, make: Make, device: torch.device) -> None:
    w, copy = (make((5, 7, 3, 11), torch.float32, layout) for _ in range(2))
    table = TensorTable(device)
    table.update([w], [copy])
    restore(table)
    assert torch.equal(w, copy)


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_restore(count: int, device: torch.device) -> None:
    empty = [torch.zeros(0, device=device) for _ in range(count)]
    table = TensorTable(device)
    table.update(empty, empty)
    restore(table)


@DTYPES
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_nothing_else_is_written(shift: int, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    pad, numel = 32 + shift, 2048 + 333
    buffer = torch.full((numel + 80,), 7.0, dtype=dtype, device=device)
    table = TensorTable(device, chunk=SMALL_CHUNK)
    table.update([buffer[pad : pad + numel]], [make(numel, dtype)])
    restore(table)
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
    table = TensorTable(device)
    table.update([w], [copy])
    config = launch_config(torch.float16)
    with table.device_guard():
        _restore_kernel[(1,)](
            table.addresses,
            table.numels,
            table.block_tensor,
            table.block_chunk,
            table.num_blocks - 1,
            DTYPE=TRITON_DTYPES[torch.float16],
            CHUNK=table.chunk,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    assert (w[-5:] == 2.0).all()
    assert (w[-CHUNK:-5] == 1.0).all()


def test_autograd_notices_the_write(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (w * w).sum()  # saves w
    table = TensorTable(device)
    table.update([w], [torch.zeros(3, device=device)])
    restore(table)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_takes_two_lists(device: torch.device) -> None:
    table = TensorTable(device)
    table.update([torch.ones(3, device=device)])
    with pytest.raises(ValueError, match="1 lists"):
        restore(table)


def test_a_copy_must_hold_the_bits(device: torch.device) -> None:
    table = TensorTable(device)
    table.update([torch.ones(3, device=device)], [torch.ones(3, device=device, dtype=torch.bfloat16)])
    with pytest.raises(TypeError, match=r"float32 but its copy torch\.bfloat16"):
        restore(table)
