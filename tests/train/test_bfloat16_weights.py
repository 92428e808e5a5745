"""Weights stored in bfloat16: what the perturbation really was is logged, and said where rounding spoils it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesam_dist.train.telemetry import read_metrics
from tests.conftest import Command

FLAGS = ("--precision.weights", "bf16", "--precision.compute", "bf16", "--optimizer.name", "sam")


def rows(command: Command, small: tuple[str, ...], run_dir: Path, *flags: str) -> tuple[list[dict[str, float]], str]:
    status, out, err = command(*small, "--run_dir", run_dir, *flags)
    assert (status, err) == (0, "")
    return [line for line in read_metrics(run_dir) if line["split"] == "train"], out


def test_a_small_radius_is_rounded_away_and_said_once(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    lines, out = rows(command, small, tmp_path / "run", *FLAGS, "--optimizer.rho", "1e-4")
    assert out.count("warning: ") == 1
    assert "at step 1 rho was 0.0001 but the weights, stored in bfloat16, moved by" in out
    assert all(not 2 / 3 < line["realized_rho"] / 1e-4 < 1.5 for line in lines)


def test_a_large_one_is_kept(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    """Rounding makes two roundings of half a step at most where the step is much larger than that."""
    lines, out = rows(command, small, tmp_path / "run", *FLAGS, "--optimizer.rho", "5")
    assert "warning" not in out
    assert [line["realized_rho"] for line in lines] == pytest.approx([5.0] * len(lines), rel=0.05)


def test_float32_weights_are_not_measured(command: Command, small: tuple[str, ...], tmp_path: Path) -> None:
    lines, _ = rows(command, small, tmp_path / "run")
    assert not any("realized_rho" in line for line in lines)
