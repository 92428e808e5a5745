"""TensorTable: what it holds, when it is refreshed, what it refuses."""

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
from lesam_kernels.tensor_table import GRAD_COLUMNS, PARAM_COLUMNS
from tests.kernels.cases import BF16, F16, F32, Make, Tensors, table_of


def ones(numel: int | tuple[int, ...], device: torch.device, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(numel, device=device, dtype=dtype)


@pytest.fixture
def params(device: torch.device) -> list[Tensor]:
    return [ones(3, device), ones(0, device), ones(2049, device), ones(5, device)]


@pytest.fixture
def table(params: list[Tensor]) -> TensorTable:
    return table_of(params)


def total(table: TensorTable, grads: Tensors) -> float:
    table.set("g", grads)
    return sum_sq(table, "g").item()


def test_layout(device: torch.device) -> None:
    """Rows are ordered by dtypes, in order of first appearance; empty parameters have none."""
    numels, dtypes, groups = [0, 5000, 7, 2048, 2], [BF16, F32, BF16, F32, F16], [0, 2, 1, 0, 3]
    w = [ones(n, device, dtype) for n, dtype in zip(numels, dtypes, strict=True)]
    table = TensorTable(device, chunk=2048)
    table.build(w, groups)
    table.set("copy", [None, w[1], None, w[3], w[4]])
    order = [1, 3, 2, 4]
    assert table.rows.tolist() == [[5000, 2, 0], [2048, 0, 0], [7, 1, 1], [2, 3, 2]]
    assert table.blocks.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [3, 0]]
    assert [tuple(segment)[:5] for segment in table.segments] == [
        (F32, 0, 2, 0, 4),
        (BF16, 2, 1, 4, 1),
        (F16, 3, 1, 5, 1),
    ]
    assert table.num_groups == 4
    assert table.column("w").tolist() == [w[i].data_ptr() for i in order]
    assert table.column("copy").tolist() == [w[1].data_ptr(), w[3].data_ptr(), 0, w[4].data_ptr()]


def test_addresses_are_refreshed_in_place(table: TensorTable, params: list[Tensor]) -> None:
    """What a captured CUDA graph reads stays where it is."""
    old, new = ([p * scale for p in params] for scale in (1, 2))
    assert total(table, old) == 2057.0
    buffer, rows, blocks = table.column("g"), table.rows, table.blocks
    assert total(table, new) == 4.0 * 2057
    assert (table.column("g"), table.rows, table.blocks) == (buffer, rows, blocks)
    assert buffer.tolist() == [t.data_ptr() for t in new if t.numel()]


def test_nothing_is_copied_when_nothing_moved(
    table: TensorTable, params: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    table.set("g", params)
    table.set("copy", [None, *params[1:]])
    for name in ("_check_column", "_pin"):
        monkeypatch.setattr(TensorTable, name, lambda *_: pytest.fail("did more than compare"))
    table.set("g", [p.detach() for p in params])  # other objects for the same memory
    table.set("copy", [None, *params[1:]])


def test_gradients_come_and_go(table: TensorTable, params: list[Tensor]) -> None:
    grads: list[Tensor | None] = [p * 2 for p in params]
    assert total(table, grads) == 4.0 * 2057
    assert total(table, [None, *grads[1:]]) == 4.0 * 2054
    assert total(table, [None] * 4) == 0.0
    assert total(table, grads) == 4.0 * 2057


def test_columns_are_cleared(table: TensorTable, params: list[Tensor]) -> None:
    assert table.has("w")
    assert not table.has("g")
    table.set("g", params)
    assert table.has("g")
    table.clear("g")
    table.clear("g")
    assert not table.has("g")
    with pytest.raises(ValueError, match=r"no column 'g'; call table.set\('g', ...\)"):
        sum_sq(table, "g")


def test_build_forgets_the_columns(table: TensorTable, params: list[Tensor], device: torch.device) -> None:
    table.set("g", params)
    longer = [*params, ones(4, device)]
    table.build(longer, [0] * 5)
    assert not table.has("g")
    assert total(table, longer) == 2061.0
    table.build([], [])
    assert total(table, []) == 0.0
    assert table.num_groups == 1


def test_same_address_other_shape(table: TensorTable, device: torch.device) -> None:
    """A rebuilt table does not take the old number of elements for the new."""
    buffer = ones(5000, device)
    for numel in (5000, 10, 3000):
        table.build([buffer[:numel]], [0])
        assert total(table, [buffer[:numel]]) == numel


def test_same_address_other_dtype(table: TensorTable, device: torch.device) -> None:
    buffer = torch.zeros(64, device=device)
    view = buffer.view(BF16)[:64]
    view.fill_(1.0)
    table.build([buffer], [0])
    assert total(table, [buffer]) != 64.0
    table.build([view], [0])
    assert total(table, [view]) == 64.0


def test_weights_move(table: TensorTable, params: list[Tensor]) -> None:
    """As where a model's tensors are given new storages of the same layout."""
    new = [p.clone() for p in params]
    buffer = table.column("w")
    table.set("w", new)
    assert table.column("w") is buffer
    assert buffer.tolist() == [p.data_ptr() for p in new if p.numel()]
    assert all(a is b for a, b in zip(table.written, new, strict=True))


def test_only_parameters_are_kept_alive(table: TensorTable, params: list[Tensor]) -> None:
    """A gradient that zero_grad drops must not wait for the next one."""
    grads = [p.clone() for p in params]
    table.set("g", grads)
    gradient, parameter = weakref.ref(grads[0]), weakref.ref(params[0])
    grads.clear()
    params.clear()
    gc.collect()
    assert gradient() is None
    assert parameter() is not None


def test_two_tables_are_independent(device: torch.device) -> None:
    first, second = table_of([ones(3, device)]), table_of([ones(5, device)])
    assert (first.rows[:, 0].tolist(), second.rows[:, 0].tolist()) == ([3], [5])


def test_chunks_beyond_two_to_the_31_elements(device: torch.device) -> None:
    numel = 2**31 + 5
    try:
        large = torch.empty(numel, dtype=torch.float16, device=device)  # reserved, never touched
    except RuntimeError as error:
        pytest.skip(f"no room for a tensor of 4 GiB: {error}")
    table = table_of([large], chunk=CHUNK)
    assert table.rows[:, 0].tolist() == [numel]
    assert table.num_blocks == -(-numel // CHUNK)
    assert table.blocks[-1].tolist() == [0, 2**31 // CHUNK]


@pytest.mark.parametrize("count", [0, 3])
def test_no_elements(count: int, device: torch.device) -> None:
    empty = [ones(0, device) for _ in range(count)]
    table = table_of(empty, g=empty, device=device)
    assert (table.num_blocks, table.segments, table.column("w").numel()) == (0, (), 0)


def test_an_address_for_every_row(table: TensorTable, params: list[Tensor]) -> None:
    """Rows without a tensor where another column has one; a parameter without elements is no row."""
    table.set("g_hat", params)
    table.set("exp_avg", [params[0], None, None, params[3]])
    with pytest.raises(ValueError, match="parameter 2 has a tensor in column 'g_hat' but none in 'exp_avg'"):
        table.require("exp_avg", where="g_hat")
    table.set("g_hat", [params[0], params[1], None, None])
    table.require("exp_avg", where="g_hat")


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_unsupported_dtype(dtype: torch.dtype, device: torch.device) -> None:
    good, bad = ones(3, device), torch.zeros(3, dtype=dtype, device=device)
    with pytest.raises(TypeError, match=rf"parameter 1 is {dtype}; supported dtypes are float32, bfloat16, float16\."):
        table_of([good, bad])


def test_lengths_differ(table: TensorTable, params: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="4 params and 1 groups"):
        table.build(params, [0])
    with pytest.raises(ValueError, match="column 'g' got 3 tensors for 4 parameters"):
        table.set("g", params[:3])


def test_negative_group(table: TensorTable, params: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="groups has -1"):
        table.build(params, [0, 1, -1, 0])


def test_unknown_column(table: TensorTable, params: list[Tensor]) -> None:
    with pytest.raises(KeyError, match="no column is called 'grad'"):
        table.set("grad", params)


@pytest.mark.parametrize("column", [*PARAM_COLUMNS, *GRAD_COLUMNS])
def test_a_column_has_the_parameters_dtypes(column: str, device: torch.device) -> None:
    w = [ones(3, device), ones(4, device, BF16)]
    table = table_of(w)
    good = [ones(3, device), ones(4, device, BF16)]
    table.set(column, good)
    hint = "build the table again" if column == "w" else "convert it"
    with pytest.raises(
        TypeError, match=rf"column '{column}', parameter 1.* is torch\.float16.* torch\.bfloat16; {hint}"
    ):
        table.set(column, [good[0], ones(4, device, torch.float16)])
    assert table.column(column).tolist() == [t.data_ptr() for t in good]


def test_a_step_is_one_float32(table: TensorTable, device: torch.device) -> None:
    table.set("step", [torch.zeros((), device=device)] * 4)
    for bad in (torch.zeros((), dtype=torch.int64, device=device), ones(3, device)):
        with pytest.raises(TypeError, match="a step is one float32 element"):
            table.set("step", [bad] * 4)
    with pytest.raises(ValueError, match="parameter 0: the tensor is on 'meta'"):
        table.set("step", [torch.zeros((), device="meta")] * 4)


def test_numbers_of_elements_differ(table: TensorTable, params: list[Tensor], device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"parameter 3: the tensor has 4 elements .* the parameter has 5 "):
        table.set("g", [*params[:3], ones(4, device)])


def test_other_device(table: TensorTable, params: list[Tensor], device: torch.device) -> None:
    with pytest.raises(ValueError, match="parameter 1 is on 'meta'"):
        table_of([ones(3, device), torch.ones(3, device="meta")])
    with pytest.raises(ValueError, match="column 'g', parameter 3: the tensor is on 'meta'"):
        table.set("g", [*params[:3], torch.ones(5, device="meta")])


@pytest.mark.parametrize(
    "view",
    [lambda t: t[:, ::2], lambda t: t[:, :3], lambda t: t[:1].expand(4, 6)],
    ids=["strided", "narrowed", "expanded"],
)
def test_not_dense(view: Callable[[Tensor], Tensor], device: torch.device) -> None:
    w = view(torch.ones(4, 6, device=device))
    with pytest.raises(ValueError, match="parameter 0 is not dense in memory"):
        table_of([w])
    with pytest.raises(ValueError, match="parameter 0: the tensor is not dense in memory"):
        table_of([w.contiguous()], g=[w])


def test_sparse(table: TensorTable, device: torch.device) -> None:
    w = torch.eye(3, device=device)
    with pytest.raises(ValueError, match="not dense in memory"):
        table_of([w.to_sparse()])
    with pytest.raises(ValueError, match="not dense in memory"):
        table_of([w], g=[w.to_sparse()])


def test_sparse_where_there_was_a_dense_one(table: TensorTable, params: list[Tensor]) -> None:
    table.set("g", params)
    with pytest.raises(ValueError, match="parameter 2: the tensor is not dense in memory"):
        table.set("g", [*params[:2], params[2].to_sparse(), params[3]])
    table.set("g", params)


def test_unusual_tensors_among_usual_ones(device: torch.device) -> None:
    """An empty parameter, a missing gradient, and strides that differ where they mean nothing."""
    w = [torch.ones(8, 4, 1, 1, device=device), ones(0, device), torch.ones(2, 3, 4, 5, device=device), ones(5, device)]
    w[2] = w[2].contiguous(memory_format=torch.channels_last)
    table = table_of(w)
    like = torch.ones_like(w[0]).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    for grads in ([like, w[1], torch.ones_like(w[2]), None], [None, None, None, ones(5, device)], w):
        table.set("g", grads)
        assert table.column("g").tolist() == [0 if grads[i] is None else grads[i].data_ptr() for i in (0, 2, 3)]
        with pytest.raises(ValueError, match=r"parameter 2: .* same order"):
            table.set("g", [*grads[:2], torch.ones(2, 3, 4, 5, device=device), grads[3]])
    with pytest.raises(ValueError, match=r"parameter 3: the tensor has 4 elements"):
        table.set("g", [None, None, None, ones(4, device)])


def test_without_memory() -> None:
    w = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="parameter 0 has no memory of its own"):
        table_of([w])


def test_no_gradient_is_not_a_gradient_without_memory(device: torch.device) -> None:
    class Wrapper(Tensor):  # as a DTensor: its own data_ptr is 0
        def data_ptr(self) -> int:
            return 0

    w = ones(3, device)
    table = table_of([w], g=[None])
    with pytest.raises(ValueError, match="column 'g', parameter 0: the tensor has no memory of its own"):
        table.set("g", [ones(3, device).as_subclass(Wrapper)])


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "dtype": (lambda g: g.bfloat16(), TypeError, "is torch.bfloat16, but the parameter torch.float32"),
    "shape": (lambda g: ones((3, 2), g.device), ValueError, "do not lie in the same order"),
    "elements": (lambda g: ones((2, 4), g.device), ValueError, "has 8 elements"),
    "strides": (lambda g: ones((3, 2), g.device).t(), ValueError, "do not lie in the same order"),
    "gaps": (lambda g: ones((2, 6), g.device)[:, ::2], ValueError, "is not dense in memory"),
    "memory": (lambda g: torch.empty_like(g, device="meta"), ValueError, "on 'meta'"),
}


@pytest.mark.parametrize("guards", ["torch's", "with other arguments", "gone"])
@pytest.mark.parametrize("wrong", WRONG)
def test_gradients_that_passed_do_not_open_the_door(
    wrong: str, guards: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is like the last list that passed is not looked at one by one; what is not, is."""
    if guards == "gone":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    elif guards == "with other arguments":
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", lambda: None)
    table = table_of([ones((2, 3), device), ones(5, device)])
    lists = [[ones((2, 3), device), ones(5, device)] for _ in range(3)]
    for grads in lists:
        table.set("g", grads)
        assert table.column("g").tolist() == [g.data_ptr() for g in grads]
    make_wrong, error, message = WRONG[wrong]
    with pytest.raises(error, match=f"column 'g', parameter 0: the tensor.*{message}"):
        table.set("g", [make_wrong(lists[0][0]), lists[0][1]])
    assert table.column("g").tolist() == [g.data_ptr() for g in lists[-1]]
    table.set("g", [None, lists[0][1]])
    assert table.column("g").tolist() == [0, lists[0][1].data_ptr()]


def test_memory_formats_differ(make: Make) -> None:
    shape = (2, 3, 4, 5)
    formats = ["contiguous", "channels_last", "transposed"]
    for first, second in itertools.permutations(formats, 2):
        with pytest.raises(ValueError, match=r"parameter 0: .* same order"):
            table_of([make(shape, F32, first)], g=[make(shape, F32, second)])
    for same in formats:
        table_of([make(shape, F32, same)], g=[make(shape, F32, same)])


def test_strides_of_size_one_do_not_matter(device: torch.device) -> None:
    """A 1x1 convolution's weight and its channels_last gradient lie alike, whatever their strides say."""
    w = torch.ones(8, 4, 1, 1, device=device)
    g = torch.ones(8, 4, 1, 1, device=device).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    assert w.stride() != g.stride()
    table_of([w], g=[g])


def test_weights_are_not_missing(table: TensorTable, params: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="parameter 2: there is no tensor"):
        table.set("w", [*params[:2], None, params[3]])


def test_a_refused_call_changes_nothing(table: TensorTable, params: list[Tensor], device: torch.device) -> None:
    table.set("g", params)
    with pytest.raises(TypeError):
        table.set("g", [ones(3, device), *(p.double() for p in params[1:])])
    with pytest.raises(TypeError):
        table.build([p.double() for p in params], [0] * 4)
    assert sum_sq(table, "g").item() == 2057.0
    assert total(table, params) == 2057.0


@pytest.mark.parametrize("chunk", [0, -2048, 1000, 3000])
def test_chunk_is_whole_blocks(chunk: int, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"chunk is {chunk};"):
        TensorTable(device, chunk=chunk)


@pytest.mark.gpu
def test_device_without_index(cuda: torch.device) -> None:
    table = TensorTable("cuda")
    table.build([torch.ones(3, device=cuda)], [0])
    assert table.device == cuda
