"""sum_sq against a float64 sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, sum_sq
from lesam_kernels.launch_config import CHUNK, SUPPORTED_DTYPES

Make = Callable[..., Tensor]
SMALL_CHUNK = 2048

# The inputs are exact in float32 whatever their dtype. On its way an element passes at most 16 additions (a
# chunk in blocks of 1024) and 10 (the tree over a block) in float32, each of 2**-24 relative: 1.6e-6.
REL = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
DTYPES = pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)


def oracle(tensors: Sequence[Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors)


def run(tensors: Sequence[Tensor], device: torch.device, chunk: int = SMALL_CHUNK) -> Tensor:
    table = TensorTable(device, chunk=chunk)
    table.update(tensors)
    return sum_sq(table)


@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "offset1"])
@pytest.mark.parametrize("numel", [1, 15, 16, 17, 1021, 2047, 2048, 2049, 3 * 2048, 5003])
def test_one_tensor(numel: int, layout: str, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    tensors = [make(numel, dtype, layout)]
    assert run(tensors, device).item() == pytest.approx(oracle(tensors), rel=REL[dtype])


@DTYPES
@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    tensors = [make(numel, dtype)]
    assert run(tensors, device, CHUNK).item() == pytest.approx(oracle(tensors), rel=REL[dtype])


def test_long_list_of_mixed_dtypes_and_layouts(make: Make, device: torch.device, rng: torch.Generator) -> None:
    sizes = torch.randint(0, 3000, (60,), generator=rng).tolist()
    layouts = ["contiguous", "offset1"]
    tensors = [make(n, SUPPORTED_DTYPES[i % 3], layouts[i % 2]) for i, n in enumerate(sizes)]
    tensors[30] = tensors[30][:0]
    assert run(tensors, device).item() == pytest.approx(oracle(tensors), rel=2e-6)


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_dense_layouts(layout: str, make: Make, device: torch.device) -> None:
    tensors = [make((5, 7, 3, 11), torch.float32, layout), make((1, 64, 1, 1), torch.float32, layout)]
    assert run(tensors, device).item() == pytest.approx(oracle(tensors), rel=2e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_to_sum(count: int, device: torch.device) -> None:
    result = run([torch.zeros(0, device=device) for _ in range(count)], device)
    assert result.item() == 0.0
    assert result.shape == ()
    assert result.dtype == torch.float64
    assert result.device.type == device.type


@pytest.mark.usefixtures("poison")
def test_workspace_is_written_before_it_is_read(make: Make, device: torch.device) -> None:
    tensors = [make(n, torch.float32) for n in (1, 2048, 5003)]
    assert run(tensors, device).item() == pytest.approx(oracle(tensors), rel=2e-6)


@DTYPES
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", ["first", "last"])
def test_non_finite_element(position: str, value: float, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    tensors = [make(n, dtype) for n in (2049, 16, 4099)]
    tensor, index = (tensors[0], 0) if position == "first" else (tensors[-1], -1)
    tensor[index] = value
    assert not math.isfinite(run(tensors, device).item())


def test_largest_float16_does_not_overflow(device: torch.device) -> None:
    tensors = [torch.full((4099,), 65504.0, dtype=torch.float16, device=device)]
    assert run(tensors, device).item() == pytest.approx(4099 * 65504.0**2, rel=2e-6)


@DTYPES
def test_bits_depend_on_the_values_alone(dtype: torch.dtype, make: Make, device: torch.device) -> None:
    aligned = [make(n, dtype) for n in (2049, 17, 6001)]
    unaligned = [torch.cat([t[:1], t])[1:] for t in aligned]
    first = run(aligned, device)
    assert all(torch.equal(run(aligned, device), first) for _ in range(3))
    assert torch.equal(run(unaligned, device), first)


def test_sum_over_a_partition(make: Make, device: torch.device) -> None:
    whole = make(9001, torch.float32)
    parts = [run([part], device).item() for part in whole.split([1000, 1, 5000, 3000])]
    assert sum(parts) == pytest.approx(run([whole], device).item(), rel=1e-6)


def test_results_do_not_share_memory(make: Make, device: torch.device) -> None:
    table = TensorTable(device)
    table.update([torch.ones(3, device=device)])
    first = sum_sq(table)
    table.update([torch.ones(5, device=device)])
    second = sum_sq(table)
    assert (first.item(), second.item()) == (3.0, 5.0)


def test_takes_one_list(device: torch.device) -> None:
    table = TensorTable(device)
    with pytest.raises(ValueError, match="0 lists"):
        sum_sq(table)
    table.update([torch.ones(3, device=device)], [torch.ones(3, device=device)])
    with pytest.raises(ValueError, match="2 lists"):
        sum_sq(table)


@pytest.mark.gpu
def test_graph_replay_reads_the_current_values(cuda: torch.device) -> None:
    grads = [torch.ones(n, device=cuda) for n in (5, CHUNK + 1)]
    table = TensorTable(cuda)
    table.update(grads)
    sum_sq(table)  # compiles, which cannot happen during capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sum_sq(table)
    grads[0].fill_(2.0)
    graph.replay()
    assert result.item() == oracle(grads)
