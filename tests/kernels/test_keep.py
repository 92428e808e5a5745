"""perturb with ``keep``: the first gradient is saved bit for bit, beside the perturbation that it makes anyway."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lesam_kernels import perturb
from tests.kernels.cases import EACH_DTYPE, F32, SIZES, Make, clones, nan_like, same_bits, scalar, table_of

GUARD = 7.0  # in the elements around a tensor, which nothing may write


def between_guards(t: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """NaN like ``t`` at an offset of ``shift`` elements, and the storage around it."""
    whole = torch.full((shift + t.numel() + 16,), GUARD, dtype=t.dtype, device=t.device)
    own = whole[shift : shift + t.numel()]
    return own.fill_(math.nan), whole


@EACH_DTYPE
@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0)], ids=["aligned", "g-off", "kept-off"])
@pytest.mark.parametrize("sigma", [0.3, 0.0], ids=["moved", "unmoved"])
def test_saves_every_bit(sigma: float, layouts: tuple[int, int], dtype: torch.dtype, make: Make) -> None:
    kept_off, g_off = layouts
    w = [make(n, dtype) for n in SIZES]
    g = [make(n, dtype, "offset1" if g_off else "contiguous") for n in SIZES]
    kept, around = zip(*(between_guards(t, kept_off) for t in w), strict=True)
    plain, copies, plain_copies = clones(w), nan_like(w), nan_like(w)
    radius = torch.tensor([[sigma, 0.2, 1e-12]], dtype=torch.float64, device=w[0].device)
    stats = perturb(table_of(w, g=g, copy=copies, g_kept=kept), scalar(9.0, w[0]), radius, keep=True)

    expected = perturb(table_of(plain, g=g, copy=plain_copies), scalar(9.0, w[0]), radius)
    assert torch.equal(stats, expected)
    assert same_bits(w, plain)
    assert same_bits(copies, plain_copies)
    assert same_bits(kept, g)
    for own, whole in zip(kept, around, strict=True):
        assert (whole[:kept_off] == GUARD).all()
        assert (whole[kept_off + own.numel() :] == GUARD).all()


@pytest.mark.parametrize("norm_sq", [4.0, math.inf, math.nan])
def test_rows_with_a_place_for_it(norm_sq: float, make: Make) -> None:
    """Perturbed or not, whatever the norm; rows that lack either tensor, or the copy, keep the rest as it is."""
    w, g = ([make(n, F32) for n in (5, 40, 2100, 300)] for _ in range(2))
    kept, copies, before = nan_like(w), nan_like(w), clones(w)
    table = table_of(
        w,
        g=[g[0], g[1], None, g[3]],
        copy=[copies[0], None, copies[2], copies[3]],
        g_kept=[kept[0], kept[1], kept[2], None],
    )
    radius = torch.tensor([[0.3, 0.2, 0.0]], dtype=torch.float64, device=w[0].device)
    perturb(table, scalar(norm_sq, w[0]), radius, keep=True)
    assert same_bits(kept[:2], g[:2])
    assert same_bits(kept[2:], nan_like(w[2:]))
    assert same_bits(copies, [before[0], *nan_like(w[1:3]), before[3]])
    assert same_bits(w[1:3], before[1:3])
    assert same_bits(w, before) == (not math.isfinite(norm_sq))


def test_needs_its_column(device: torch.device) -> None:
    w = [torch.ones(3, device=device)]
    table = table_of(w, g=clones(w), copy=clones(w))
    with pytest.raises(ValueError, match="'g_kept'"):
        perturb(table, scalar(1.0, w[0]), torch.ones(1, 3, dtype=torch.float64, device=device), keep=True)
