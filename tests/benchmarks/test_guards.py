"""benchmarks/guards.py: that every variant trains with what it is called after, and what the table is made of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import guards
import pytest

from tests.benchmarks.test_scripts import check_files, outputs


def test_variants_take_turns_and_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--ranks", "1", "--model", "cifar_resnet8", "--batch", "8"]
    assert guards.main([*flags, "--steps", "2", "--rounds", "2", *outputs(tmp_path)]) == 0
    stdout = capsys.readouterr().out
    document = check_files(tmp_path, stdout[stdout.index("## Guards") :])
    assert [result["variant"] for result in document["results"]] == [*list(guards.VARIANTS)[1:], "agreement on a step"]
    assert json.loads((tmp_path / "out.json").read_text())["results"][-1]["share"] < 1


def test_a_ratio_is_of_all_rounds_together() -> None:
    """What is done in one round of two shows, unlike in a median; what is amplified is scaled to a run's interval."""
    seconds = {name: [1.0, 1.0, 1.0, 1.0] for name in guards.VARIANTS} | {"agreement": [1e-6]}
    seconds["guard.max_loss_increase"] = [1.0, 1.4, 1.0, 1.0]
    seconds[guards.CHECKING] = [1.2] * 4
    seconds[guards.SAVING[0]] = [1.5] * 4
    results = {result["variant"]: result for result in guards.compare(seconds, argparse.Namespace(steps=10))}
    guard = results["guard.max_loss_increase"]
    assert guard["ratio"] == pytest.approx(1.1)
    assert guard["share"] == pytest.approx(0.1)
    assert guard["error"] == pytest.approx(0.1)  # a standard deviation of 0.2, of four
    assert results["off again"]["ratio"] == 1
    assert results[guards.CHECKING]["share"] == pytest.approx(0.2 / 10)  # once in 100 steps, not in 10
    assert results[guards.SAVING[0]]["share"] == pytest.approx(0.5 / guards.INTERVAL)
    assert results["agreement on a step"]["share"] == pytest.approx(1e-5)
