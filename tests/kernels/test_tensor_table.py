"""TensorTable: what it holds, when it is rebuilt or refreshed, what it refuses."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, sum_sq
from lesam_kernels.launch_config import CHUNK

Make = Callable[..., Tensor]


@pytest.fixture
def table(device: torch.device) -> TensorTable:
    return TensorTable(device, chunk=2048)


def total(table: TensorTable, tensors: list[Tensor]) -> float:
    table.update(tensors)
    return sum_sq(table).item()


def ones(numel: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(numel, device=device, dtype=dtype)


def test_layout(table: TensorTable, device: torch.device) -> None:
    """Rows are ordered by dtypes, in order of first appearance; empty tensors have none."""
    half = torch.bfloat16
    w = [ones(5000, device), ones(0, device), ones(7, device, half), ones(2048, device)]
    g = [ones(5000, device), ones(0, device), ones(7, device), ones(2048, device)]
    table.update(w, g)
    order = [0, 3, 2]
    assert table.num_lists == 2
    assert table.addresses.tolist() == [[w[i].data_ptr(), g[i].data_ptr()] for i in order]
    assert table.numels.tolist() == [5000, 2048, 7]
    assert table.dtype_codes.tolist() == [0, 0, 1]
    assert table.block_tensor.tolist() == [0, 0, 0, 1, 2]
    assert table.block_chunk.tolist() == [0, 1, 2, 0, 0]
    assert [tuple(group) for group in table.groups] == [
        ((torch.float32, torch.float32), 0, 4),
        ((half, torch.float32), 4, 1),
    ]


def test_addresses_are_refreshed_in_place(table: TensorTable, device: torch.device) -> None:
    """What a captured CUDA graph reads stays where it is."""
    old = [ones(3, device), ones(2049, device)]
    table.update(old)
    buffers = (table.addresses, table.numels, table.block_tensor)
    new = [t * 2 for t in old]
    assert total(table, new) == 4.0 * 2052
    for before, after in zip(buffers, (table.addresses, table.numels, table.block_tensor), strict=True):
        assert after is before
    assert table.addresses.flatten().tolist() == [t.data_ptr() for t in new]


def test_nothing_is_copied_when_nothing_changed(
    table: TensorTable, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = torch.nn.Parameter(ones(3, device))
    table.update([parameter])
    monkeypatch.setattr(TensorTable, "_stage", lambda *_: pytest.fail("copied"))
    table.update([parameter])
    table.update([parameter.data])  # another object for the same memory


def test_same_address_other_size(table: TensorTable, device: torch.device) -> None:
    buffer = ones(5000, device)
    assert [total(table, [buffer[:n]]) for n in (5000, 10, 3000)] == [5000.0, 10.0, 3000.0]


def test_same_address_other_dtype(table: TensorTable, device: torch.device) -> None:
    buffer = torch.zeros(64, device=device)
    view = buffer.view(torch.bfloat16)[:64]
    view.fill_(1.0)
    assert total(table, [buffer]) != 64.0
    assert total(table, [view]) == 64.0


def test_same_address_and_size_other_strides(table: TensorTable, device: torch.device) -> None:
    square = torch.ones(4, 4, device=device)
    table.update([square], [square.clone()])
    with pytest.raises(ValueError, match="do not lie in the same order"):
        table.update([square.t()], [square.clone()])


def test_list_grows_and_shrinks(table: TensorTable, device: torch.device) -> None:
    tensors = [ones(n, device) for n in (3, 2049, 5)]
    assert [total(table, tensors[:n]) for n in (1, 3, 2, 0, 3)] == [3.0, 2057.0, 2052.0, 0.0, 2057.0]


def test_tensor_becomes_empty_and_full_again(table: TensorTable, device: torch.device) -> None:
    tensors = [ones(3, device), ones(4, device)]
    assert total(table, tensors) == 7.0
    assert total(table, [tensors[0][:0], tensors[1]]) == 4.0
    assert total(table, tensors) == 7.0


def test_number_of_lists_changes(table: TensorTable, device: torch.device) -> None:
    tensors = [ones(3, device)]
    table.update(tensors, tensors)
    assert table.addresses.shape == (1, 2)
    assert total(table, tensors) == 3.0


def test_gradients_are_not_kept_alive(table: TensorTable, device: torch.device) -> None:
    """A gradient that zero_grad drops must not wait for the next update; until the launch it must not go."""
    g = ones(3, device)
    gradient = weakref.ref(g)
    table.update([g])
    del g
    gc.collect()
    assert gradient() is not None
    assert sum_sq(table).item() == 3.0
    gc.collect()
    assert gradient() is None


def test_written_tensors(table: TensorTable, device: torch.device) -> None:
    w, copy = ones(3, device), ones(3, device)
    table.update([w], [copy])
    assert table.written == (w,)
    table.update([w])
    assert table.written == ()


def test_two_tables_are_independent(device: torch.device) -> None:
    first, second = TensorTable(device), TensorTable(device)
    first.update([ones(3, device)])
    second.update([ones(5, device)])
    assert (first.numels.tolist(), second.numels.tolist()) == ([3], [5])


def test_chunks_beyond_two_to_the_31_elements(device: torch.device) -> None:
    numel = 2**31 + 5
    try:
        large = torch.empty(numel, dtype=torch.float16, device=device)  # reserved, never touched
    except RuntimeError as error:
        pytest.skip(f"no room for a tensor of 4 GiB: {error}")
    table = TensorTable(device)
    table.update([large])
    assert table.numels.tolist() == [numel]
    assert table.num_blocks == -(-numel // CHUNK)
    assert table.block_chunk[-1].item() == 2**31 // CHUNK


@pytest.mark.parametrize("count", [0, 3])
def test_no_elements(count: int, table: TensorTable, device: torch.device) -> None:
    table.update([ones(0, device) for _ in range(count)])
    assert (table.num_lists, table.num_blocks, table.groups) == (1, 0, ())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_unsupported_dtype(dtype: torch.dtype, table: TensorTable, device: torch.device) -> None:
    good, bad = ones(3, device), torch.zeros(3, dtype=dtype, device=device)
    expected = rf"tensor 1 of list 0 is {dtype}; supported dtypes are float32, bfloat16, float16\."
    with pytest.raises(TypeError, match=expected):
        table.update([good, bad])
    with pytest.raises(TypeError, match="tensor 0 of list 1 "):
        table.update([good], [bad])


def test_no_list(table: TensorTable) -> None:
    with pytest.raises(ValueError, match="no list"):
        table.update()


def test_lengths_differ(table: TensorTable, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"\[2, 1\] tensors"):
        table.update([ones(3, device)] * 2, [ones(3, device)])


def test_numbers_of_elements_differ(table: TensorTable, device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"tensor 1 of list 1 has 4 elements .* list 0 has 3 "):
        table.update([ones(3, device)] * 2, [ones(3, device), ones(4, device)])


def test_other_device(table: TensorTable, device: torch.device) -> None:
    with pytest.raises(ValueError, match="tensor 1 of list 0 is on 'meta'"):
        table.update([ones(3, device), torch.ones(3, device="meta")])


@pytest.mark.parametrize(
    "view",
    [lambda t: t[:, ::2], lambda t: t[:, :3], lambda t: t[:1].expand(4, 6)],
    ids=["strided", "narrowed", "expanded"],
)
def test_not_dense(view: Callable[[Tensor], Tensor], table: TensorTable, device: torch.device) -> None:
    with pytest.raises(ValueError, match="not dense in memory"):
        table.update([view(torch.ones(4, 6, device=device))])


def test_sparse(table: TensorTable, device: torch.device) -> None:
    with pytest.raises(ValueError, match="not dense in memory"):
        table.update([torch.eye(3, device=device).to_sparse()])


def test_without_memory() -> None:
    with pytest.raises(ValueError, match="tensor 0 of list 0 has no memory of its own"):
        TensorTable("meta").update([torch.ones(3, device="meta")])


def test_memory_formats_differ(table: TensorTable, make: Make) -> None:
    shape = (2, 3, 4, 5)
    formats = ["contiguous", "channels_last", "transposed"]
    for first, second in itertools.permutations(formats, 2):
        with pytest.raises(ValueError, match=r"tensor 0 of list 1 .* same order"):
            table.update([make(shape, torch.float32, first)], [make(shape, torch.float32, second)])
    for same in formats:
        table.update(*([make(shape, torch.float32, same)] for _ in range(3)))


def test_strides_of_size_one_do_not_matter(table: TensorTable, device: torch.device) -> None:
    """A 1x1 convolution's weight and its channels_last gradient lie alike, whatever their strides say."""
    w = torch.ones(8, 4, 1, 1, device=device)
    g = torch.ones(8, 4, 1, 1, device=device).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    assert w.stride() != g.stride()
    table.update([w], [g])


def test_a_refused_update_changes_nothing(table: TensorTable, device: torch.device) -> None:
    tensors = [ones(3, device), ones(4, device)]
    table.update(tensors)
    with pytest.raises(TypeError):
        table.update([ones(9, device), ones(2, device).double()])
    assert sum_sq(table).item() == 7.0
    assert total(table, tensors) == 7.0


@pytest.mark.parametrize("chunk", [0, -2048, 1000, 3000])
def test_chunk_is_whole_blocks(chunk: int, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk};"):
        TensorTable(device, chunk=chunk)


@pytest.mark.gpu
def test_device_without_index(cuda: torch.device) -> None:
    table = TensorTable("cuda")
    table.update([torch.ones(3, device=cuda)])
    assert table.device == cuda


@pytest.mark.gpu
def test_no_copy_during_graph_capture(cuda: torch.device) -> None:
    table = TensorTable(cuda)
    old, new = ones(3, cuda), ones(3, cuda)
    table.update([old])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="CUDA graph"):
            table.update([new])
        old.add_(1)
