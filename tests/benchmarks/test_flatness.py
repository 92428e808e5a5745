"""benchmarks/flatness.py: its rank correlations, its tables, and that it finds its numbers in what analyses write."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import flatness
import numpy as np
import pytest
from lib import ranks


def tau_b(x: list[float], y: list[float]) -> float:
    """By its definition, pair by pair."""
    signs = [(np.sign(a - b), np.sign(c - d)) for (a, c), (b, d) in combinations(zip(x, y, strict=True), 2)]
    first, second = (sum(s[i] != 0 for s in signs) for i in (0, 1))
    return float(sum(a * b for a, b in signs)) / math.sqrt(first * second)


def test_correlations_are_those_of_all_pairs(seed: int) -> None:
    """With ties; a method whose measure never varies has none of its own."""
    random = np.random.default_rng(seed)
    methods, seeds = ["a", "b", "c", "flat"], range(4)
    errors = {(m, s): float(random.permutation(6)[s]) for m in methods for s in seeds}
    measure = {(m, s): 7.0 if m == "flat" else float(random.integers(20)) + 0.01 * s for m in methods for s in seeds}
    found = ranks.correlations(measure, errors)
    assert found.overall == pytest.approx(tau_b(list(measure.values()), list(errors.values())))
    each = [tau_b([measure[m, s] for s in seeds], [errors[m, s] for s in seeds]) for m in methods[:3]]
    assert found.within_methods.value == pytest.approx(np.mean(each))
    assert found.within_methods.error == pytest.approx(np.std(each, ddof=1) / math.sqrt(3))
    assert found.within_methods.count == 3


def test_a_mean_is_shown_where_students_t_tells_it_from_zero() -> None:
    critical = 2.776  # of five values, two-sided, 5 %
    assert ranks.Mean(critical * 1.01, 1.0, 5).is_shown()
    assert not ranks.Mean(-critical * 0.99, 1.0, 5).is_shown()
    assert not ranks.Mean(5.0, 0.0, 2).is_shown(), "two values that agree"
    assert not ranks.mean_of([3.0]).is_shown()
    assert ranks.mean_of([math.nan]).count == 0


def test_tables(seed: int) -> None:
    random = np.random.default_rng(seed)
    names, seeds = ["sgd", "lesam"], 5
    numbers = {
        m.name: {(name, s): random.normal(10.0, 1.0) for name in names for s in range(seeds)} for m in flatness.MEASURES
    }
    for run in numbers["ECE"]:
        numbers["ECE"][run] = 1.0 * run[1] + 100 * (run[0] == "lesam")
    text = flatness.sections(numbers, names, seeds)
    sgd = [numbers["trace"]["sgd", s] for s in range(seeds)]
    assert f"| trace | {np.mean(sgd):.0f} ± {np.std(sgd, ddof=1):.0f} |" in text
    apart = [numbers["trace"]["lesam", s] - numbers["trace"]["sgd", s] for s in range(seeds)]
    assert f"| trace | {np.mean(apart):+.0f} ± {np.std(apart, ddof=1) / math.sqrt(5):.0f}" in text
    assert "| ECE | +100.000 ± 0.000 |" in text


def test_each_number_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a few steps, analysed with fewer draws: the analyses that a whole study makes, by their own names."""
    of_all = flatness.ANALYSES
    few = {
        "hessian": ("--samples", "8", *of_all["hessian"][2:4], "--trace_vectors", "1", "--density_vectors", "0"),
        "lpf": ("--samples", "8", "--draws", "1"),
        "sharpness": ("--samples", "8", "--batch_size", "8", "--steps", "2", *of_all["sharpness"][2:]),
        "robustness": ("--samples", "4", "--steps", "1", *of_all["robustness"][2:-4], "--corruptions", "fog"),
    }
    few["hessian"] += ("--tolerance", "0.5")
    monkeypatch.setattr(flatness, "ANALYSES", few)
    flags = ("--data.root", str(tmp_path / "digits"), "--data.batch_size", "100", "--epochs", "1")
    settings: dict[str, Any] = {"flags": list(flags)}
    results = flatness.measured(tmp_path, "digits_noisy_resnet8", ("sgd", 0), flags, settings)
    numbers = {measure.name: measure.of(results) for measure in flatness.MEASURES}
    assert all(map(math.isfinite, numbers.values()))
    right = round(3.59 * (100 - numbers["test error (%)"]))
    assert numbers["test error (%)"] == pytest.approx(100 * (1 - right / 359)), "of all validation images"
    assert numbers["training loss"] == results["lpf"]["loss"]
    monkeypatch.setattr(flatness, "train", lambda *_: pytest.fail("done before"))
    assert flatness.measured(tmp_path, "digits_noisy_resnet8", ("sgd", 0), flags, settings) == results
