"""perturb against the same formula in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lesam_kernels import perturb, sum_sq
from lesam_kernels.launch_config import CHUNK
from tests.kernels.cases import (
    BF16,
    DTYPES,
    EACH_DTYPE,
    F16,
    F32,
    SIZES,
    SMALL_CHUNK,
    Make,
    clones,
    nan_like,
    same_bits,
    scalar,
    table_of,
)

# Units in the last place of w's dtype. The kernel rounds once more than the oracle (to float32, then to w's
# dtype); the interpreter truncates to bfloat16 where a GPU rounds to nearest.
ULPS = {F32: 1, BF16: 1, F16: 1}
# The step itself is off by the roundings of rho/norm and of the unfused product: 2 * 2**-24, relative. A metric and
# an average add six more.
STEP_REL = 2**-22


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
    "against": Radius(sigma=-0.3, rho_max=0.2),
    "against-sam": Radius(sigma=-math.inf, rho_max=0.05),
}
RADIUS = RADII["no-cap"]


class Case:
    """Weights, gradients and copies; remembers the first weights."""

    def __init__(self, w: Sequence[Tensor], g: Sequence[Tensor], chunk: int = SMALL_CHUNK, **more: Any) -> None:
        self.w, self.g = list(w), list(g)
        self.copies, self.before = nan_like(w), clones(w)
        self.table = table_of(w, g=g, copy=self.copies, chunk=chunk, **more)

    def run(self, sum_sq: float, *radii: Radius, **options: Tensor) -> list[float]:
        radius = torch.tensor(radii, dtype=torch.float64, device=self.w[0].device)
        stats = perturb(self.table, scalar(sum_sq, self.w[0]), radius, **options)
        assert stats.shape == (3,)
        assert stats.dtype == torch.float64
        return stats.tolist()

    def grad_sum_sq(self) -> float:
        return sum(float(t.double().square().sum()) for t in self.g)

    def check_moved(self, *scales: float) -> None:
        """By rho/norm times the gradient; one scale for all, or one each."""
        directions = [t.double() for t in self.g]
        self.check_steps([s * d for s, d in zip(scales * (len(self.w) // len(scales)), directions, strict=True)])

    def check_steps(self, steps: Sequence[Tensor], step_rel: float = STEP_REL) -> None:
        assert same_bits(self.copies, self.before)
        for w, step, before in zip(self.w, steps, self.before, strict=True):
            expected = before.double() + step
            info = torch.finfo(w.dtype)
            ulp = info.eps * expected.abs().clamp_min(info.smallest_normal)
            error = (w.double() - expected).abs()
            assert (error <= ULPS[w.dtype] * ulp + step_rel * step.abs()).all()

    def check_unmoved(self) -> None:
        assert same_bits(self.copies, self.before)
        assert same_bits(self.w, self.before)


def oracle(sum_sq: float, radius: Radius) -> tuple[float, float]:
    norm = math.sqrt(sum_sq)
    return norm, min(abs(radius.sigma) / (norm + radius.eps), radius.rho_max)


def check(case: Case, radius: Radius) -> None:
    squared = case.grad_sum_sq()
    norm, rho = oracle(squared, radius)
    assert case.run(squared, radius) == pytest.approx([norm, rho, 0.0], rel=1e-14)
    case.check_moved(math.copysign(rho, radius.sigma) / norm)


@EACH_DTYPE
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
def test_every_dtype(w_layout: str, g_layout: str, dtype: torch.dtype, make: Make) -> None:
    w = [make(n, dtype, w_layout) for n in SIZES]
    g = [make(n, dtype, g_layout) for n in SIZES]
    check(Case(w, g), RADII["cap-active"])


@pytest.mark.parametrize("name", RADII)
def test_every_radius(name: str, make: Make) -> None:
    w, g = ([make(n, F32) for n in (5, 2100)] for _ in range(2))
    check(Case(w, g), RADII[name])


@EACH_DTYPE
@pytest.mark.parametrize("numel", [CHUNK - 1, CHUNK, CHUNK + 1], ids=["CHUNK-1", "CHUNK", "CHUNK+1"])
def test_default_chunk(numel: int, dtype: torch.dtype, make: Make) -> None:
    check(Case([make(numel, dtype)], [make(numel, dtype)], CHUNK), RADII["cap-active"])


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_dense_layouts(layout: str, make: Make) -> None:
    shapes = [(5, 7, 3, 11), (3, 1, 5, 5)]
    w, g = ([make(shape, F32, layout) for shape in shapes] for _ in range(2))
    check(Case(w, g), RADIUS)


def test_long_list_of_mixed_dtypes(make: Make, rng: torch.Generator) -> None:
    """Every tensor is moved once although each dtype has its own launch."""
    sizes = torch.randint(0, 2500, (60,), generator=rng).tolist()
    w, g = ([make(n, DTYPES[i % 3]) for i, n in enumerate(sizes)] for _ in range(2))
    check(Case(w, g), RADII["cap-active"])


def test_the_norm_of_a_larger_gradient(make: Make) -> None:
    """A shard moves by its part of the whole gradient."""
    case = Case([make(100, F32)], [make(100, F32)])
    norm, rho = oracle(1e4, RADIUS)
    assert case.run(1e4, RADIUS) == pytest.approx([norm, rho, 0.0], rel=1e-14)
    case.check_moved(rho / norm)


def test_the_realised_distance_is_rho(make: Make, device: torch.device) -> None:
    case = Case([torch.zeros(n, device=device) for n in SIZES], [make(n, F32) for n in SIZES])
    _, rho, _ = case.run(sum_sq(case.table, "g").item(), RADIUS)
    assert math.sqrt(sum(float(t.double().square().sum()) for t in case.w)) == pytest.approx(rho, rel=1e-6)


def test_every_group_has_its_radius(make: Make) -> None:
    """In each launch; the reported one is that of the table's first row."""
    radii = [RADIUS, Radius(sigma=0.0, rho_max=1.0), RADII["sam"]]
    groups, sizes, dtypes = [2, 0, 1, 0], (5, 2100, 40, 3), (F32, F32, F32, F16)
    w, g = ([make(n, dtype) for n, dtype in zip(sizes, dtypes, strict=True)] for _ in range(2))
    case = Case(w, g, groups=groups)
    squared = case.grad_sum_sq()
    norm = math.sqrt(squared)
    rhos = [oracle(squared, radius)[1] for radius in radii]
    assert case.run(squared, *radii) == pytest.approx([norm, rhos[2], 0.0], rel=1e-14)
    case.check_moved(*(rhos[group] / norm for group in groups))
    assert same_bits([case.w[2]], [case.before[2]])


@pytest.mark.parametrize("sigma", [0.3, 0.0], ids=["moved", "unmoved"])
def test_rows_without_gradient_or_copy_are_left_alone(sigma: float, make: Make) -> None:
    w, g = ([make(n, F32) for n in (2100, 5, 33)] for _ in range(2))
    before, copies = clones(w), nan_like(w)
    table = table_of(w, g=[g[0], None, g[2]], copy=[None, copies[1], copies[2]])
    perturb(table, scalar(1.0, w[0]), torch.tensor([[sigma, 0.2, 0.0]], dtype=torch.float64, device=w[0].device))
    assert same_bits(w[:2], before[:2])
    assert same_bits(copies, [*nan_like(w[:2]), before[2]])
    assert same_bits(w[2:], before[2:]) == (sigma == 0.0)


# ---- options -----------------------------------------------------------------------------------------------------


@EACH_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "offset1"])
@pytest.mark.parametrize("names", [("metric",), ("ema_scale",), ("metric", "ema_scale")], ids="-".join)
def test_options(names: Sequence[str], layout: str, dtype: torch.dtype, make: Make) -> None:
    """w + rho/norm * T^2 * v, with T and v as in sum_sq, for two groups."""
    sizes, groups = (2069, 0, 33), [0, 0, 1]
    w = [make(n, dtype) for n in sizes]
    g, ema = ([make(n, dtype, layout) for n in sizes] for _ in range(2))
    device = w[0].device
    given = {
        "metric": torch.tensor([[1.0, 0.01], [0.5, 2.0]], device=device),
        "ema_scale": torch.tensor([0.9, -0.3], device=device),
    }
    given = {name: given[name] for name in names}
    case = Case(w, g, groups=groups, ema=ema)
    steps, slack = [], []
    rho, norm = 0.2, 16.0
    for before, grad, average, group in zip(case.before, g, ema, groups, strict=True):
        v = grad.double()
        size = v.abs()
        if "ema_scale" in given:
            subtracted = given["ema_scale"][group].double() * average.double()
            v, size = v - subtracted, size + subtracted.abs()
        if "metric" in given:
            p, q = given["metric"][group].double()
            metric = (p * before.double().abs() + q).square()
            v, size = v * metric, size * metric
        steps.append(rho / norm * v)
        slack.append(rho / norm * size)
    case.run(norm**2, *[Radius(math.inf, rho)] * 2, **given)
    assert same_bits(case.copies, case.before)
    for after, before, step, size in zip(case.w, case.before, steps, slack, strict=True):
        expected = before.double() + step
        ulp = torch.finfo(after.dtype).eps * expected.abs().clamp_min(torch.finfo(after.dtype).smallest_normal)
        # Near a cancellation the step is as exact as what was subtracted.
        assert ((after.double() - expected).abs() <= ulp + 4 * STEP_REL * size).all()


def test_an_asam_step_has_its_length(make: Make, device: torch.device) -> None:
    """In the metric of T, the perturbation is rho long: sum_sq and perturb agree on T."""
    case = Case([make(n, F32) for n in SIZES], [make(n, F32) for n in SIZES])
    metric = torch.tensor([[1.0, 0.01]], device=device)
    squared = sum_sq(case.table, "g", metric=metric).item()
    case.run(squared, Radius(math.inf, 0.5), metric=metric)
    length = 0.0
    for w, before in zip(case.w, case.before, strict=True):
        length += float(((w.double() - before.double()) / (before.double().abs() + 0.01)).square().sum())
    assert math.sqrt(length) == pytest.approx(0.5, rel=1e-4)


# ---- what keeps every bit ----------------------------------------------------------------------------------------


def special(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weights that arithmetic would change: -0, NaN, infinities, the smallest subnormal."""
    values = [-0.0, 0.0, math.nan, math.inf, -math.inf, torch.finfo(dtype).tiny * torch.finfo(dtype).eps]
    return [
        torch.tensor(values * 600, dtype=dtype, device=device),
        torch.tensor([-0.0], dtype=dtype, device=device),
    ]


@EACH_DTYPE
@pytest.mark.parametrize("infinite_cap", [False, True], ids=["cap", "no-cap"])
def test_zero_sigma_keeps_every_bit(infinite_cap: bool, dtype: torch.dtype, make: Make, device: torch.device) -> None:
    w = special(dtype, device)
    case = Case(w, [make(len(t), dtype) for t in w])
    radius = Radius(sigma=0.0, rho_max=math.inf if infinite_cap else 0.2)
    assert case.run(4.0, radius) == [2.0, 0.0, 0.0]
    case.check_unmoved()


@EACH_DTYPE
@pytest.mark.parametrize("name", RADII)
def test_zero_gradient_keeps_every_bit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    w = special(dtype, device)
    case = Case(w, [torch.zeros_like(t) for t in w])
    assert case.run(0.0, RADII[name]) == [0.0, 0.0, 0.0]
    case.check_unmoved()


@EACH_DTYPE
@pytest.mark.parametrize("name", RADII)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_gradient_keeps_every_bit(bad: float, name: str, dtype: torch.dtype, device: torch.device) -> None:
    w = special(dtype, device)
    case = Case(w, [torch.full_like(t, bad) for t in w])
    grad_norm, rho, non_finite = case.run(bad, RADII[name])
    assert grad_norm == bad or (math.isnan(grad_norm) and math.isnan(bad))
    assert (rho, non_finite) == (0.0, 1.0)
    case.check_unmoved()


@EACH_DTYPE
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
    table = table_of(empty, g=empty, copy=empty, device=device)
    squared_norm = torch.tensor(squared, dtype=torch.float64, device=device)
    stats = perturb(table, squared_norm, torch.tensor([RADIUS], dtype=torch.float64, device=device)).tolist()
    rho = oracle(squared, RADIUS)[1] if 0 < squared < math.inf else 0.0
    assert stats == pytest.approx([math.sqrt(squared), rho, float(squared == math.inf)], rel=1e-14)


@EACH_DTYPE
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("sigma", [0.3, 0.0], ids=["moved", "unmoved"])
def test_nothing_else_is_written(
    sigma: float, shift: int, dtype: torch.dtype, device: torch.device, make: Make
) -> None:
    """Tensors in the middle of a larger buffer leave what is around them alone."""
    pad, numel = 32 + shift, 2048 + 333
    w, g, copies = (torch.full((numel + 80,), 7.0, dtype=dtype, device=device) for _ in range(3))
    w_inner, g_inner, copy_inner = ([t[pad : pad + numel]] for t in (w, g, copies))
    w_inner[0].copy_(make(numel, dtype))
    table = table_of(w_inner, g=g_inner, copy=copy_inner)
    radius = torch.tensor([Radius(sigma, 0.2)], dtype=torch.float64, device=device)
    perturb(table, torch.tensor(float(numel), dtype=torch.float64, device=device), radius)
    assert (g == 7.0).all()
    for buffer in (w, copies):
        assert (buffer[:pad] == 7.0).all()
        assert (buffer[pad + numel :] == 7.0).all()


def test_results_do_not_share_memory(make: Make, device: torch.device) -> None:
    case = Case([make(3, F32)], [make(3, F32)])
    radius = torch.tensor([RADIUS], dtype=torch.float64, device=device)
    first, second = (perturb(case.table, scalar(value, case.w[0]), radius) for value in (4.0, 9.0))
    assert (first[0].item(), second[0].item()) == (2.0, 3.0)


def test_autograd_notices_the_write(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, device=device))
    loss = (w * w).sum()  # saves w
    Case([w], [torch.ones(3, device=device)]).run(1.0, RADIUS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what it refuses ---------------------------------------------------------------------------------------------


def arguments(device: torch.device) -> tuple[Case, Tensor, Tensor]:
    one = torch.ones((), dtype=torch.float64, device=device)
    case = Case([torch.ones(3, device=device)], [torch.ones(3, device=device)], groups=[1])
    return case, one, torch.ones(2, 3, dtype=torch.float64, device=device)


@pytest.mark.parametrize("column", ["g", "copy"])
def test_needs_the_columns_that_it_reads(column: str, device: torch.device) -> None:
    case, one, radius = arguments(device)
    case.table.clear(column)
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        perturb(case.table, one, radius)


def test_needs_an_average_for_every_gradient(device: torch.device) -> None:
    case, one, radius = arguments(device)
    case.table.set("ema", [None])
    with pytest.raises(ValueError, match="parameter 0 has a tensor in column 'g' but none in 'ema'"):
        perturb(case.table, one, radius, ema_scale=torch.ones(2, device=device))


def test_checks_the_scalars(device: torch.device) -> None:
    case, one, radius = arguments(device)
    with pytest.raises(TypeError, match=r"sum_sq is torch\.float32"):
        perturb(case.table, one.float(), radius)
    with pytest.raises(ValueError, match=r"radius has shape \(1, 3\) .* of shape \(2, 3\)"):
        perturb(case.table, one, radius[:1])
    with pytest.raises(ValueError, match=r"radius .* 'meta'"):
        perturb(case.table, one, radius.to("meta"))
    with pytest.raises(ValueError, match="metric"):
        perturb(case.table, one, radius, metric=torch.ones(2, device=device))


@pytest.mark.gpu
@EACH_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "offset1"])
def test_rounds_to_nearest_on_a_gpu(layout: str, dtype: torch.dtype, make: Make, cuda: torch.device) -> None:
    """Bit for bit: float64 holds the exact result of the fma far beyond float32's rounding."""
    case = Case([make(n, dtype, layout) for n in SIZES], [make(n, dtype, layout) for n in SIZES])
    squared = case.grad_sum_sq()
    radius = RADII["cap-active"]
    norm, rho = oracle(squared, radius)
    case.run(squared, radius)
    scale = torch.tensor(rho / norm).float().double().to(cuda)
    for w, g, before in zip(case.w, case.g, case.before, strict=True):
        assert torch.equal(w, (before.double() + scale * g.double()).float().to(dtype))
