"""benchmarks/guards.py: that every variant trains with what it is called after, and what the table is made of."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import guards
import pytest

from tests.benchmarks.test_scripts import check_files, outputs


def test_variants_take_turns_and_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--ranks", "1", "--model", "cifar_resnet8", "--batch", "8"]
    assert guards.main([*flags, "--steps", "2", "--rounds", "2", *outputs(tmp_path)]) == 0
    stdout = capsys.readouterr().out
    document = check_files(tmp_path, stdout[stdout.index("## Guards") :])
    assert [result["variant"] for result in document["results"]] == [*list(guards.VARIANTS)[1:], *guards.ALONE]
    assert json.loads((tmp_path / "out.json").read_text())["results"][-1]["share"]["wall"] < 1


def test_a_ratio_is_of_a_usual_round(seed: int) -> None:
    """A turn that met another job moves nothing; errors are errors; what is amplified is scaled to a run's interval."""
    draw = random.Random(seed)
    seconds = {name: [draw.gauss(1, 0.01) for _ in range(4000)] for name in guards.VARIANTS}
    seconds |= {name: [guards.CALLS * 1e-6] for name in guards.ALONE}
    seconds["guard.max_loss_increase"] = [1.1 * own for own in seconds["off"]]
    seconds["guard.max_loss_increase"][:400] = [9.0] * 400
    seconds[guards.CHECKING] = [1.2 * own for own in seconds["off"]]
    cpu = seconds | {guards.CHECKING: [1.3 * own for own in seconds["off"]]}
    results = {result["variant"]: result for result in guards.compare(seconds, cpu, argparse.Namespace(steps=10))}
    assert results["guard.max_loss_increase"]["wall"]["ratio"] == pytest.approx(1.1)
    again = results["off again"]["wall"]
    assert again["error"] == pytest.approx(1.2533 * 0.01 * 2**0.5 / 4000**0.5, rel=0.15)  # of a median of normal ratios
    assert abs(again["ratio"] - 1) < 6 * again["error"]
    assert results[guards.ALONE[0]]["share"]["wall"] == pytest.approx(1e-5, rel=0.01), "ten steps in a second"
    rows = {row[0]: row[1:] for row in guards.rows(list(results.values()))}
    assert rows[guards.CHECKING][0].startswith("1.200 ± 0.0")
    assert rows[guards.CHECKING][1].startswith("2.00% ± 0.0"), "once in 100 steps, not in 10"
    assert rows[guards.CHECKING][2].startswith("1.300 ± 0.0")
    assert results[guards.SAVING[0]]["turns"] == pytest.approx(guards.INTERVAL, rel=0.01)
