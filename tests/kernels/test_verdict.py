"""Gradients that are not finite, as the kernels find them: found_inf and skipped; and factors of the mixture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lesam_kernels import perturb, restore_adamw, restore_sgd
from tests.kernels.cases import BF16, F32, Make, clones, same_bits, scalar, table_of

UPDATES = {"sgd": restore_sgd, "adamw": restore_adamw}
STATE = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
EACH_UPDATE = pytest.mark.parametrize("name", UPDATES)
FINITE = [0.0, 3.0, 1e300]
NOT_FINITE = [math.inf, math.nan]


class Update:
    """Weights of two dtypes and two groups after a perturbation, ready for one update."""

    def __init__(self, name: str, make: Make, seed_of: Update | None = None) -> None:
        self.name = name
        if seed_of is None:
            sizes = [(5, F32), (2100, BF16), (4099, F32), (33, BF16)]
            self.exact, self.g_hat, self.kept = ([make(n, dtype) for n, dtype in sizes] for _ in range(3))
        else:
            self.exact, self.g_hat, self.kept = (clones(t) for t in (seed_of.exact, seed_of.g_hat, seed_of.kept))
        self.device = self.exact[0].device
        self.w = [t + 1 for t in self.exact]
        self.state = {column: [torch.zeros_like(t) for t in self.w] for column in STATE[name]}
        self.steps = [torch.zeros((), device=self.device) for _ in self.w]
        self.table = table_of(
            self.w, groups=[0, 1, 1, 0], copy=self.exact, g=self.g_hat, g_hat=self.g_hat, g_kept=self.kept, **self.state
        )
        self.table.set("step", self.steps)
        self.found_inf, self.skipped = (torch.tensor(v, device=self.device) for v in (0.0, 41.0))

    def run(self, mixtures: tuple[tuple[float, float], ...] = ((1.0, 0.5), (0.7, -0.2)), **options: Tensor) -> None:
        if self.name == "sgd":
            rows = [(0.1, 0.9, 0.0, 0.01, 1.0, a, b) for a, b in mixtures]
            scalars = torch.tensor(rows, device=self.device)
        else:
            rows = [(0.1, 0.9, 0.99, 1e-8, 0.01, a, b) for a, b in mixtures]
            scalars = torch.tensor(rows, dtype=torch.float64, device=self.device)
        UPDATES[self.name](self.table, scalars, self.found_inf, skipped=self.skipped, **options)

    def same(self, other: Update) -> bool:
        pairs: list[Any] = [(self.w, other.w), *zip(self.state.values(), other.state.values(), strict=True)]
        return all(same_bits(a, b) for a, b in pairs) and torch.equal(torch.stack(self.steps), torch.stack(other.steps))


@EACH_UPDATE
@pytest.mark.parametrize("value", FINITE)
def test_a_finite_sum_changes_nothing(value: float, name: str, make: Make) -> None:
    plain = Update(name, make)
    checked = Update(name, make, plain)
    plain.run()
    checked.run(sum_sq=scalar(value, checked.w[0]))
    assert checked.same(plain)
    assert (checked.found_inf.item(), checked.skipped.item()) == (0.0, 41.0)


@EACH_UPDATE
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_sum_that_is_not_finite_skips_the_update(value: float, name: str, make: Make) -> None:
    """In every launch, one for each dtype, and it is counted once."""
    update = Update(name, make)
    update.run(sum_sq=scalar(value, update.w[0]))
    assert same_bits(update.w, update.exact)
    assert not any(t.any() for tensors in update.state.values() for t in tensors)
    assert not any(step.any() for step in update.steps)
    assert (update.found_inf.item(), update.skipped.item()) == (1.0, 42.0)


@EACH_UPDATE
@pytest.mark.parametrize("value", [3.0, math.inf])
def test_a_first_gradient_that_was_not_finite_counts_once(value: float, name: str, make: Make) -> None:
    update = Update(name, make)
    update.found_inf.fill_(1.0)
    update.run(sum_sq=scalar(value, update.w[0]))
    assert same_bits(update.w, update.exact)
    assert (update.found_inf.item(), update.skipped.item()) == (1.0, 42.0)


@EACH_UPDATE
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("value", [3.0, math.nan])
def test_a_rank_without_elements_tells_too(value: float, count: int, name: str, device: torch.device) -> None:
    empty = [torch.empty(0, device=device)] * count
    table = table_of(empty, device=device)
    for column in ("copy", "g", "g_hat", *STATE[name]):
        table.set(column, empty)
    table.set("step", [torch.zeros((), device=device)] * count)
    found_inf, skipped = (torch.zeros((), device=device) for _ in range(2))
    dtype = F32 if name == "sgd" else torch.float64
    scalars = torch.ones(1, 7, dtype=dtype, device=device)
    sum_sq = torch.tensor(value, dtype=torch.float64, device=device)
    UPDATES[name](table, scalars, found_inf, sum_sq=sum_sq, skipped=skipped)
    assert found_inf.item() == skipped.item() == float(math.isnan(value))


@EACH_UPDATE
def test_factors_multiply_the_mixture(name: str, make: Make) -> None:
    """Of each param group; powers of two, which round nothing."""
    scaled = Update(name, make)
    plain = Update(name, make, scaled)
    a, b = torch.tensor([[0.5, 4.0], [2.0, 0.25]], dtype=torch.float64, device=scaled.device)
    scaled.run(((1.0, 0.5), (0.7, -0.2)), a_factors=a, b_factors=b)
    plain.run(((0.5, 1.0), (2.8, -0.05)))
    assert scaled.same(plain)


@EACH_UPDATE
def test_checks_its_arguments(name: str, make: Make) -> None:
    update = Update(name, make)
    with pytest.raises(TypeError, match=r"sum_sq is torch\.float32; it must be torch\.float64"):
        update.run(sum_sq=torch.zeros((), device=update.device))
    with pytest.raises(ValueError, match=r"a_factors has shape \(3,\)"):
        update.run(a_factors=torch.ones(3, dtype=torch.float64, device=update.device))
    assert same_bits(update.w, [t + 1 for t in update.exact])


@pytest.mark.parametrize("raise_only", [False, True])
@pytest.mark.parametrize("before", [0.0, 1.0])
@pytest.mark.parametrize("value", [*FINITE, *NOT_FINITE])
@pytest.mark.parametrize("sizes", [(5, 2100, 4096), ()], ids=["rows", "no rows"])
def test_perturb_sets_found_inf(
    sizes: tuple[int, ...], value: float, before: float, raise_only: bool, make: Make, device: torch.device
) -> None:
    w, g, copies = ([make(n, F32) for n in sizes] for _ in range(3))
    table = table_of(w, g=g, copy=copies, device=device)
    found_inf = torch.tensor(before, device=device)
    sum_sq = torch.tensor(value, dtype=torch.float64, device=device)
    radius = torch.tensor([[0.3, 0.2, 1e-12]], dtype=torch.float64, device=device)
    stats = perturb(table, sum_sq, radius, found_inf=found_inf, raise_only=raise_only)
    bad = float(not math.isfinite(value))
    assert stats[2].item() == bad
    assert found_inf.item() == max(bad, before if raise_only else 0.0)
