"""Sums over tensors: their value, and that their bits follow from the values alone, not from addresses or threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lesam_dist
from lesam_dist.optim.engine import reference

SHAPES = [(1,), (77,), (4096,), (64, 3, 3, 3), (4097,), (601, 180), (128, 128, 3, 3), (2000, 700)]
Reduction = Callable[[list[Tensor], list[Tensor]], Tensor]
REDUCTIONS: dict[str, Reduction] = {
    "sum_sq": lambda a, _: reference.sum_sq(a),
    "dot": reference.dot,
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """A copy ``offset`` elements beyond a multiple of 64 bytes."""
    buffer = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    start = (-buffer.data_ptr() % 64) // tensor.element_size() + offset
    return buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_bits_do_not_depend_on_addresses_or_threads(seed: int, name: str) -> None:
    first, second = ([torch.randn(shape) for shape in SHAPES] for _ in range(2))
    results = set()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for offset in range(16 if count == 1 else 2):
            moved = [[shifted(t, (offset + i) % 16) for i, t in enumerate(tensors)] for tensors in (first, second)]
            results.add(REDUCTIONS[name](*moved).item())
    assert len(results) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values(seed: int, dtype: torch.dtype) -> None:
    """Against float64; the layout does not matter, and an empty tensor counts nothing."""
    first, second = ([torch.randn(shape).to(dtype) for shape in [*SHAPES, (0, 3)]] for _ in range(2))
    first[3] = first[3].to(memory_format=torch.channels_last)
    scale = sum(a.double().square().sum() for a in first)
    # float32: 4096 addends in 32 or more partial sums round off less than 1e-6 of their absolute values' sum.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    square = reference.sum_sq(first)
    assert square.dtype == torch.float64
    torch.testing.assert_close(square, torch.as_tensor(scale), rtol=tolerance, atol=0)
    products = sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True))
    assert abs(reference.dot(first, second) - products) <= tolerance * scale
    assert torch.equal(reference.dot(first, first), square)


def test_no_other_reduction_of_tensors_is_used() -> None:
    """These have other bits at another address or with more threads; what feeds a state goes through `reference`."""
    banned = re.compile(
        r"(torch\.v?dot|torch\.inner|einsum|linalg\.\w+|\bnorm|clip_grad_norm_|total_norm|_foreach_norm)\("
    )
    package = Path(lesam_dist.__file__).parent
    # One is there to be read and nothing runs on it; and of an analysis nothing comes back into a run.
    files = [path for path in package.rglob("*.py") if path.name != "simple.py" and "analysis" not in path.parts]
    # A rule's `norm()` is that of a `Vector`, which goes through `reference` as well.
    rules = {path.name for path in (package / "optim").glob("*.py")} | {"vectors.py"}
    lines = ((path.name, line) for path in files for line in path.read_text().splitlines())
    lines = ((name, re.sub(r"\bnorm\((self)?\)", "", line) if name in rules else line) for name, line in lines)
    found = [(name, match[1]) for name, line in lines if (match := banned.search(line.partition("#")[0]))]
    # The other one is for a GPU, whose kernel adds in a fixed order.
    assert sorted(found) == [("layers.py", "_foreach_norm"), ("reference.py", "linalg.vector_norm")]
