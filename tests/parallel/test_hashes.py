"""The hash by which replicas are compared: exact on bits, whatever the dtype, and blind to nothing that matters."""

from __future__ import annotations

import operator
import random

import pytest
import torch
from torch import Tensor

from lesam_dist.parallel import hashes
from lesam_dist.parallel.hashes import CHUNK, Hasher

CPU = torch.device("cpu")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


def draw_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if dtype == torch.int64:
        return torch.randint(-(2**62), 2**62, shape)
    return torch.randn(shape, dtype=dtype)


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes."""
    flat = tensor.view(-1)
    return (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)


@pytest.fixture(scope="module")
def hasher() -> Hasher:
    return Hasher()


def one(hasher: Hasher, tensor: Tensor) -> int:
    return int(hasher.each([tensor], CPU))


def spelled_out(tensor: Tensor, multipliers: list[int]) -> int:
    """The formula of the module in Python's own integers, on what numpy sees."""
    data = bits_of(tensor.contiguous()).numpy().tobytes()
    size, whole = min(4, tensor.element_size()), len(data) // 4 * 4
    total = 0
    for start, stop, step, signed in ((0, whole, 4, True), (whole, len(data), size, size > 1)):
        if start < stop:
            numbers = [int.from_bytes(data[i : i + step], "little", signed=signed) for i in range(start, stop, step)]
            total = total * 0x5851F42D4C957F2D + sum(map(operator.mul, multipliers, numbers))
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_formula_and_no_flipped_bit_is_missed(hasher: Hasher, seed: int, dtype: torch.dtype) -> None:
    draw = random.Random(seed)
    multipliers = [one(hasher, unit) for unit in torch.eye(1000, dtype=torch.int32)]
    for shape in ((), (draw.randrange(1, 5),), (draw.randrange(50, 60), 7)):
        tensor = draw_tensor(dtype, *shape)
        before = one(hasher, tensor)
        assert before == spelled_out(tensor, multipliers)
        data = bits_of(tensor)
        for _ in range(20):
            byte, bit = draw.randrange(len(data)), 1 << draw.randrange(1 if dtype == torch.bool else 8)
            data[byte] ^= bit
            assert one(hasher, tensor) != before, (byte, bit)
            data[byte] ^= bit
        assert one(hasher, tensor) == before


def test_tensors_beyond_a_chunk_and_out_of_step_with_words(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small chunk: each position must count, also across chunks and in the bytes that fill no integer."""
    monkeypatch.setattr(hashes, "CHUNK", 8)
    hasher = Hasher()
    memory = torch.randn(60).bfloat16()
    for offset in range(3):
        tensor = memory[offset : offset + 45]
        assert one(hasher, tensor) == one(hasher, tensor.clone()), "where a tensor lies must not count"
    found = set()
    for i in range(45):
        for bit in range(16):
            tensor = torch.zeros(45, dtype=torch.int16)
            tensor[i] = 1 << bit if bit < 15 else -(2**15)
            found.add(one(hasher, tensor.view(torch.bfloat16)))
    assert len(found) == 45 * 16, "two of all single bits have the same hash"


def test_a_swap_of_two_elements_or_tensors_shows(hasher: Hasher, seed: int) -> None:
    draw = random.Random(seed)
    tensor = torch.randn(CHUNK + 1000)
    before = one(hasher, tensor)
    for _ in range(30):
        i, j = draw.sample(range(len(tensor)), 2)
        if draw.random() < 0.5:
            tensor[j] = -tensor[i]  # they differ in the highest bit alone
            before = one(hasher, tensor)
        tensor[[i, j]] = tensor[[j, i]]
        assert one(hasher, tensor) != before
        before = one(hasher, tensor)
    several = hasher.each([torch.randn(3), torch.randn(5), torch.zeros(0)], CPU)
    assert hasher.of(several) != hasher.of(several[[1, 0, 2]])
    assert several[2] == 0
    assert hasher.each([], CPU).shape == (0,)


def test_neither_threads_nor_strides_change_a_hash(hasher: Hasher, seed: int) -> None:
    tensor = torch.randn(64, 100, 100)
    expected = one(hasher, tensor)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert one(hasher, tensor) == expected
    finally:
        torch.set_num_threads(threads)
    strided = tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert one(hasher, strided) == expected
    assert one(hasher, torch.tensor([0.0])) != one(hasher, torch.tensor([-0.0])), "equal numbers, other bits"
