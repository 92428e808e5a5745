"""The table while a CUDA graph is captured, and after: what a graph reads stays, and nothing is copied too early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lesam_kernels import TensorTable, capture, sum_sq
from tests.kernels.cases import table_of


class NothingRuns(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} would be in the graph")


@contextmanager
def capturing() -> Iterator[None]:
    with mock.patch.object(capture, "is_capturing", return_value=True), NothingRuns():  # type: ignore[no-untyped-call]
        yield


def lists(count: int, device: torch.device, length: int = 3) -> list[list[Tensor]]:
    """So many lists of gradients, three tensors each; those of list i are full of i + 1."""
    return [[torch.full((length,), float(i + 1), device=device) for _ in range(3)] for i in range(count)]


def addresses(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


@pytest.fixture
def table(device: torch.device) -> TensorTable:
    return table_of(lists(1, device)[0], chunk=2048)


def test_addresses_are_noted_and_uploaded_later(table: TensorTable, device: torch.device) -> None:
    eager, first, second = lists(3, device)
    table.set("g", eager)
    with capturing():
        table.set("g", first)
        buffers = [table.column("g")]
        table.set("g", second)
        buffers.append(table.column("g"))
    assert [b.tolist() for b in buffers] == [[0, 0, 0]] * 2  # a replay before the upload finds no tensors
    table.upload()
    assert [b.tolist() for b in buffers] == [addresses(first), addresses(second)]


@pytest.mark.parametrize("is_new", [True, False])
def test_launches_outside_do_not_disturb_a_graph(table: TensorTable, device: torch.device, is_new: bool) -> None:
    """Whether its addresses came in the capture or, as those of gradients that stay in place, before it."""
    before, captured, after, last = lists(4, device)
    table.set("g", before)
    weights = table.column("w")
    with capturing():
        if is_new:
            table.set("g", captured)
        else:
            table.set("g_hat", captured)  # any column: the graph may read all
        of_graph = table.column("g")
    table.upload()
    expected = addresses(captured if is_new else before)
    for grads in (after, last, captured, before):
        table.set("g", grads)
        assert table.column("g").tolist() == addresses(grads)
        assert of_graph.tolist() == expected
        assert float(sum_sq(table, "g")) == sum(float(t.square().sum()) for t in grads)
    assert table.column("w") is weights


def test_the_same_addresses_share_a_buffer(table: TensorTable, device: torch.device) -> None:
    """Within a capture, between columns and between captures: an allocator gives the same memory again."""
    a, b = lists(2, device)
    with capturing():
        for column, grads in (("g", a), ("g_hat", b), ("g", b), ("g_hat", a), ("g", a)):
            table.set(column, grads)
        buffers = [table.column("g"), table.column("g_hat")]
        assert buffers[0] is buffers[1]
    with capturing():
        table.set("g", b)
        table.set("g", a)
        assert table.column("g") is buffers[0]


def test_an_eager_step_after_a_capture_that_was_given_up(table: TensorTable, device: torch.device) -> None:
    """Its gradients may have the addresses that were noted, and nobody uploaded."""
    (grads,) = lists(1, device)
    with capturing():
        table.set("g", grads)
    table.set("g", grads)
    assert table.column("g").tolist() == addresses(grads)


def test_each_capture_may_have_so_many_lists(table: TensorTable, device: torch.device) -> None:
    *many, last = lists(3 * capture.NEW_LISTS + 1, device)
    for start in range(0, len(many), capture.NEW_LISTS):
        table.upload()
        with capturing():
            for grads in many[start : start + capture.NEW_LISTS]:
                table.set("g", grads)
    with capturing(), pytest.raises(RuntimeError, match=f"more than {capture.NEW_LISTS} lists"):
        table.set("g", last)
    table.upload()
    with capturing():
        table.set("g", last)


@pytest.mark.parametrize("count", [1, 2, 3, 33])
def test_buffers_are_aligned(count: int, device: torch.device) -> None:
    """Else Triton would compile the kernels for other arguments, within the capture."""
    w = [torch.ones(3, device=device) for _ in range(count)]
    table = table_of(w, chunk=2048)
    for _ in range(capture.NEW_LISTS):
        grads = [torch.ones(3, device=device) for _ in range(count)]
        with capturing():
            table.set("g", grads)
        assert table.column("g").data_ptr() % 16 == 0
        assert table.column("g").shape == table.column("w").shape
        assert table.column("g").is_contiguous()


def test_no_table_is_made_in_a_capture(table: TensorTable, device: torch.device) -> None:
    params = lists(1, device)[0]
    with capturing(), pytest.raises(RuntimeError, match="before the capture"):
        table.build(params, [0] * 3)


def test_outside_of_captures_the_buffer_stays(table: TensorTable, device: torch.device) -> None:
    a, b = lists(2, device)
    table.set("g", a)
    buffer = table.column("g")
    table.upload()
    table.set("g", b)
    assert table.column("g") is buffer


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gradients_of_a_graph(cuda: torch.device) -> None:
    """Made in the graph's memory, at other addresses than the ones before, and filled anew by every replay."""
    source = torch.ones(3, device=cuda)
    table = table_of(lists(1, cuda)[0], chunk=2048, g=lists(1, cuda)[0])
    sum_sq(table, "g")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = [source * scale for scale in (1, 2, 3)]
        table.set("g", grads)
        total = sum_sq(table, "g")
        with pytest.raises(RuntimeError, match="before the capture"):
            table.build(lists(1, cuda)[0], [0] * 3)
    table.upload()
    for value in (1.0, 2.0):
        source.fill_(value)
        graph.replay()
        assert float(total) == 3 * 14 * value**2
        table.set("g", lists(1, cuda)[0])
        assert float(sum_sq(table, "g")) == 9.0
