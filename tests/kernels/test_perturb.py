"""perturb against the same formula in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lesam_kernels import TensorTable, perturb, restore, sum_sq
from lesam_kernels.launch_config import CHUNK, SUPPORTED_DTYPES

Make = Callable[..., Tensor]
SMALL_CHUNK = 2048
SIZES = (1, 15, 2047, 0, 2048, 2049, 5003)

# Units in the last place of w's dtype. The kernel rounds once more than the oracle (to float32, then to w's
# dtype); the interpreter truncates to bfloat16 where a GPU rounds to nearest.
ULPS = {torch.float32: 1, torch.bfloat16: 1, torch.float16: 1}
# The step itself is off by the roundings of rho/norm and of the unfused product: 2 * 2**-24, relative.
STEP_REL = 2**-22

PAIRS = pytest.mark.parametrize(("w_dtype", "g_dtype"), list(itertools.product(SUPPORTED_DTYPES, repeat=2)), ids=str)
DTYPES = pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)


class Radius(NamedTuple):
    sigma: float
    rho_max: float
    eps: float = 1e-12


RADII = {
    "no-cap": Radius(sigma=0.3, rho_max=math.inf),
    "cap-active": Radius(sigma=1e6, rho_max=0.2),
    "cap-inactive": Radius(sigma=0.3, rho_max=0.2),
    "sam": Radius(sigma=math.inf, rho_max=0.05),
    "large-eps": Radius(sigma=0.3, rho_max=math.inf, eps=7.0),
}
RADIUS = RADII["no-cap"]


class Case:
    """Weights, gradients and copies; remembers the first weights."""

    def __init__(self, w: Sequence[Tensor], g: Sequence[Tensor], chunk: int = SMALL_CHUNK) -> None:
        self.w, self.g = list(w), list(g)
        self.copies = [torch.full_like(t, math.nan) for t in w]
        self.before = [t.clone() for t in w]
        self.device = w[0].device
        self.table = TensorTable(self.device, chunk=chunk)

    def run(self, sum_sq: float, radius: Radius) -> list[float]:
        self.table.update(self.w, self.g, self.copies)
        stats = perturb(self.table, self.scalar(sum_sq), self.scalar(radius))
        assert stats.shape == (3,)
        assert stats.dtype == torch.float64
        return stats.tolist()

    def scalar(self, value: float | Radius) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def grad_sum_sq(self) -> float:
        return sum(float(t.double().square().sum()) for t in self.g)

    def check_moved(self, norm: float, rho: float) -> None:
        self.check_saved()
        for w, g, before in zip(self.w, self.g, self.before, strict=True):
            step = rho / norm * g.double()
            expected = before.double() + step
            info = torch.finfo(w.dtype)
            ulp = info.eps * expected.abs().clamp_min(info.smallest_normal)
            error = (w.double() - expected).abs()
            assert (error <= ULPS[w.dtype] * ulp + STEP_REL * step.abs()).all()

    def check_unmoved(self) -> None:
        self.check_saved()
        for w, before in zip(self.w, self.before, strict=True):
            assert torch.equal(bits(w), bits(before))

    def check_saved(self) -> None:
        for copy, before in zip(self.copies, self.before, strict=True):
            assert torch.equal(bits(copy), bits(before))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def oracle(sum_sq: float, radius: Radius) -> tuple[float, float]:
    norm = math.sqrt(sum_sq)
    return norm, min(radius.sigma / (norm + radius.eps), radius.rho_max)


def check(case: Case, radius: Radius) -> None:
    squared = case.grad_sum_sq()
    norm, rho = oracle(squared, radius)
    assert case.run(squared, radius) == pytest.approx([norm, rho, 0.0], rel=1e-14)
    case.check_moved(norm, rho)


@PAIRS
@pytest.mark.parametrize(
    ("w_layout", "g_layout"),
    [
        ("contiguous", "contiguous"),
        ("contiguous", "offset1"),
        ("offset1", "contiguous"),
        ("offset1", "offset1"),
    ],
    ids=["aligned", "g-unaligned", "w-unaligned", "all-unaligned"],
)
def test_every_dtype_pair(w_layout: str, g_layout: str, w_dtype: torch.dtype, g_dtype: torch.dtype, make: Make) -> None:
    w = [make(n, w_dtype, w_layout) for n in SIZES]
    g = [make(n, g_dtype, g_layout) for n in SIZES]
    check(Case(w, g), RADII["cap-active"])


@pytest.mark.parametrize("name", RADII)
def test_every_radius(name: str, make: Make) -> None:
    w, g = ([make(n, torch.float32) for n in (5, 2100)] for _ in range(2))
    check(Case(w, g), RADII[name])


@DTYPES
@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, dtype: torch.dtype, make: Make) -> None:
    check(Case([make(numel, dtype)], [make(numel, dtype)], CHUNK), RADII["cap-active"])


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_dense_layouts(layout: str, make: Make) -> None:
    shapes = [(5, 7, 3, 11), (3, 1, 5, 5)]
    w, g = ([make(shape, torch.float32, layout) for shape in shapes] for _ in range(2))
    check(Case(w, g), RADIUS)


def test_long_list_of_mixed_dtype_pairs(make: Make, rng: torch.Generator) -> None:
    """Every tensor is moved once although each pair of dtypes has its own launch."""
    sizes = torch.randint(0, 2500, (60,), generator=rng).tolist()
    pairs = list(itertools.product(SUPPORTED_DTYPES, repeat=2))
    w = [make(n, pairs[i % 9][0]) for i, n in enumerate(sizes)]
    g = [make(n, pairs[i % 9][1]) for i, n in enumerate(sizes)]
    check(Case(w, g), RADII["cap-active"])


def test_the_norm_of_a_larger_gradient(make: Make) -> None:
    """A shard moves by its part of the whole gradient."""
    case = Case([make(100, torch.float32)], [make(100, torch.float32)])
    norm, rho = oracle(1e4, RADIUS)
    assert case.run(1e4, RADIUS) == pytest.approx([norm, rho, 0.0], rel=1e-14)
    case.check_moved(norm, rho)


def test_the_realised_distance_is_rho(make: Make, device: torch.device) -> None:
    w = [torch.zeros(n, device=device) for n in SIZES]
    g = [make(n, torch.float32) for n in SIZES]
    grads, table = TensorTable(device), TensorTable(device)
    copies = [torch.empty_like(t) for t in w]
    grads.update(g)
    table.update(w, g, copies)
    _, rho, _ = perturb(table, sum_sq(grads), torch.tensor(RADIUS, dtype=torch.float64, device=device))
    assert math.sqrt(sum(float(t.double().square().sum()) for t in w)) == pytest.approx(rho.item(), rel=1e-6)


def special(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weights that arithmetic would change: -0, NaN, infinities, the smallest subnormal."""
    values = [-0.0, 0.0, math.nan, math.inf, -math.inf, torch.finfo(dtype).tiny * torch.finfo(dtype).eps]
    return [
        torch.tensor(values * 600, dtype=dtype, device=device),
        torch.tensor([-0.0], dtype=dtype, device=device),
    ]


@DTYPES
@pytest.mark.parametrize("infinite_cap", [False, True], ids=["cap", "no-cap"])
def test_zero_sigma_keeps_every_bit(infinite_cap: bool, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    w = special(dtype, device)
    case = Case(w, [make(len(t), dtype) for t in w])
    radius = Radius(sigma=0.0, rho_max=math.inf if infinite_cap else 0.2)
    assert case.run(4.0, radius) == [2.0, 0.0, 0.0]
    case.check_unmoved()


@DTYPES
@pytest.mark.parametrize("name", RADII)
def test_zero_gradient_keeps_every_bit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    w = special(dtype, device)
    case = Case(w, [torch.zeros_like(t) for t in w])
    assert case.run(0.0, RADII[name]) == [0.0, 0.0, 0.0]
    case.check_unmoved()


@DTYPES
@pytest.mark.parametrize("name", RADII)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_gradient_keeps_every_bit(bad: float, name: str, dtype: torch.dtype, device: torch.device) -> None:
    w = special(dtype, device)
    case = Case(w, [torch.full_like(t, bad) for t in w])
    grad_norm, rho, non_finite = case.run(bad, RADII[name])
    assert grad_norm == bad or (math.isnan(grad_norm) and math.isnan(bad))
    assert (rho, non_finite) == (0.0, 1.0)
    case.check_unmoved()


@DTYPES
def test_nan_sigma_keeps_every_bit(dtype: torch.dtype, device: torch.device) -> None:
    """It is reported, and not taken for a radius of rho_max."""
    w = special(dtype, device)
    case = Case(w, [torch.ones_like(t) for t in w])
    grad_norm, rho, non_finite = case.run(4.0, Radius(sigma=math.nan, rho_max=0.2))
    assert (grad_norm, math.isnan(rho), non_finite) == (2.0, True, 0.0)
    case.check_unmoved()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("squared", [0.0, 9.0, math.inf])
def test_a_rank_without_elements_still_reports(squared: float, count: int, device: torch.device) -> None:
    empty = [torch.zeros(0, device=device) for _ in range(count)]
    table = TensorTable(device)
    table.update(empty, empty, empty)
    squared_norm = torch.tensor(squared, dtype=torch.float64, device=device)
    stats = perturb(table, squared_norm, torch.tensor(RADIUS, dtype=torch.float64, device=device)).tolist()
    rho = oracle(squared, RADIUS)[1] if 0 < squared < math.inf else 0.0
    assert stats == pytest.approx([math.sqrt(squared), rho, float(squared == math.inf)], rel=1e-14)


@PAIRS
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("sigma", [0.3, 0.0], ids=["moved", "unmoved"])
def test_nothing_else_is_written(
    sigma: float, shift: int, w_dtype: torch.dtype, g_dtype: torch.dtype, device: torch.device, make: Make
) -> None:
    """Tensors in the middle of a larger buffer leave what is around them alone."""
    pad, numel = 32 + shift, 2048 + 333
    w, g, copies = (torch.full((numel + 80,), 7.0, dtype=d, device=device) for d in (w_dtype, g_dtype, w_dtype))
    inner = [t[pad : pad + numel] for t in (w, g, copies)]
    inner[0].copy_(make(numel, w_dtype))
    table = TensorTable(device, chunk=SMALL_CHUNK)
    table.update(*([t] for t in inner))
    radius = torch.tensor(Radius(sigma, 0.2), dtype=torch.float64, device=device)
    perturb(table, torch.tensor(float(numel), dtype=torch.float64, device=device), radius)
    assert (g == 7.0).all()
    for buffer in (w, copies):
        assert (buffer[:pad] == 7.0).all()
        assert (buffer[pad + numel :] == 7.0).all()


def test_results_do_not_share_memory(make: Make) -> None:
    case = Case([make(3, torch.float32)], [make(3, torch.float32)])
    case.table.update(case.w, case.g, case.copies)
    first = perturb(case.table, case.scalar(4.0), case.scalar(RADIUS))
    second = perturb(case.table, case.scalar(9.0), case.scalar(RADIUS))
    assert (first[0].item(), second[0].item()) == (2.0, 3.0)


def test_autograd_notices_the_write(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (w * w).sum()  # saves w
    table = TensorTable(device)
    table.update([w], [torch.ones(3, device=device)], [torch.zeros(3, device=device)])
    one, radius = torch.ones((), dtype=torch.float64), torch.tensor(RADIUS, dtype=torch.float64)
    perturb(table, one.to(device), radius.to(device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def arguments(device: torch.device) -> tuple[TensorTable, Tensor, Tensor]:
    table = TensorTable(device)
    table.update(*([torch.ones(3, device=device)] for _ in range(3)))
    one = torch.ones((), dtype=torch.float64, device=device)
    return table, one, torch.ones(3, dtype=torch.float64, device=device)


def test_takes_three_lists(device: torch.device) -> None:
    table, one, radius = arguments(device)
    table.update([torch.ones(3, device=device)], [torch.ones(3, device=device)])
    with pytest.raises(ValueError, match="2 lists"):
        perturb(table, one, radius)


def test_a_copy_must_hold_the_bits(device: torch.device) -> None:
    table, one, radius = arguments(device)
    w = torch.ones(3, device=device)
    table.update([w], [w.clone()], [w.bfloat16()])
    with pytest.raises(TypeError, match=r"float32 but its copy torch\.bfloat16"):
        perturb(table, one, radius)


def test_checks_the_scalars(device: torch.device) -> None:
    table, one, radius = arguments(device)
    with pytest.raises(TypeError, match=r"sum_sq is torch\.float32"):
        perturb(table, one.float(), radius)
    with pytest.raises(ValueError, match=r"radius has shape \(2,\)"):
        perturb(table, one, radius[:2])
    with pytest.raises(ValueError, match=r"radius .* 'meta'"):
        perturb(table, one, radius.to("meta"))


@pytest.mark.gpu
@PAIRS
@pytest.mark.parametrize("layout", ["contiguous", "offset1"])
def test_rounds_to_nearest_on_a_gpu(
    layout: str, w_dtype: torch.dtype, g_dtype: torch.dtype, make: Make, cuda: torch.device
) -> None:
    """Bit for bit: float64 holds the exact result of the fma far beyond float32's rounding."""
    case = Case([make(n, w_dtype, layout) for n in SIZES], [make(n, g_dtype, layout) for n in SIZES])
    squared = case.grad_sum_sq()
    radius = RADII["cap-active"]
    norm, rho = oracle(squared, radius)
    case.run(squared, radius)
    scale = torch.tensor(rho / norm).float().double().to(cuda)
    for w, g, before in zip(case.w, case.g, case.before, strict=True):
        assert torch.equal(w, (before.double() + scale * g.double()).float().to(w_dtype))


@pytest.fixture
def sync_is_an_error(cuda: torch.device) -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("sync_is_an_error")
def test_a_step_never_waits_for_the_device(cuda: torch.device) -> None:
    w = [torch.ones(n, device=cuda) for n in (5, CHUNK + 1)]
    copies = [torch.empty_like(t) for t in w]
    radius = torch.tensor(RADIUS, dtype=torch.float64, device=cuda)
    norm, climb, back = (TensorTable(cuda) for _ in range(3))
    grads = []
    for step in range(4):
        if step == 1:  # the first step compiles
            torch.cuda.set_sync_debug_mode("error")
        grads.append([torch.ones_like(t) for t in w])  # kept, so that every step has new addresses
        norm.update(grads[-1])
        climb.update(w, grads[-1], copies)
        back.update(w, copies)
        perturb(climb, sum_sq(norm), radius)
        restore(back)
    torch.cuda.set_sync_debug_mode("default")
    assert all((t == 1).all() for t in w)
