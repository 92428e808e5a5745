"""The axis of a sweep: logarithmic for values that grow by factors, and each value is written where it is."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lesam_dist.experiments.report import are_spaced_by_factors, plot
from lesam_dist.experiments.runs import Outcome
from lesam_dist.tasks.classification.task import ACC1


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.01, 0.1, 1.0], True),
        ([1.0, 0.01, 0.1], True),
        ([0.05, 0.1, 0.2, 0.4], True),
        ([0.05, 0.1, 0.2, 0.5, 1.0], True),
        ([0.1, 0.2, 0.3, 0.4], False),
        ([1.0, 2.0], False),
        ([0.0, 0.01, 0.1, 1.0], False),
        ([-1.0, -0.1, -0.01], False),
    ],
)
def test_which_axis(values: list[float], wanted: bool) -> None:
    assert are_spaced_by_factors(values) == wanted


def test_even_spacings_are_told_apart(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        count, first, step = draw.randrange(3, 9), draw.uniform(1e-4, 10), draw.uniform(1.3, 10)
        assert are_spaced_by_factors([first * step**k for k in range(count)])
        assert not are_spaced_by_factors([first + step * k for k in range(count)])


@pytest.mark.parametrize(("values", "scale"), [([0.03, 0.1, 0.3, 1.0], "log"), ([0.1, 0.2, 0.3, 0.4], "linear")])
def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[float], scale: str) -> None:
    drawn: list[Axes] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        drawn.append(self.axes[0])
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    outcomes = [Outcome(f"sigma={v}", [70 + v, 71 + v, math.nan], [72.0], 2.0) for v in values]
    plot(tmp_path / "sweep.png", outcomes, ACC1, "a sweep", "optimizer.sigma", values)
    (axes,) = drawn
    assert axes.get_xscale() == scale
    if scale == "log":
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"{value:g}" for value in values]
