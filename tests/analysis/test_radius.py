"""`analyze radius`: what it makes of a log, and what it says of one that it cannot use."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lesam_dist import cli
from lesam_dist.analysis.measures.radius import radius
from lesam_dist.errors import UserError
from lesam_dist.train.telemetry import METRICS


def write(run: Path, lines: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def logged(draw: random.Random, step: int, epoch: float, rho_max: float, curvature: float) -> dict[str, Any]:
    """A step on a loss whose second-order term along the gradient is known."""
    sigma, norm, loss = draw.uniform(0.1, 1), draw.uniform(0.5, 4), draw.uniform(1, 2)
    rho = min(sigma / norm, rho_max)
    return {
        "step": step,
        "epoch": epoch,
        "split": "train",
        "loss": loss,
        "perturbed_loss": loss + rho * norm + 0.5 * curvature * rho**2,
        "grad_norm": norm,
        "rho": rho,
        "sigma": sigma,
    }


def test_means_and_bounds_of_each_epoch(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    curvature, rho_max = draw.uniform(1, 5), draw.choice([0.05, 100.0])
    lines = [logged(draw, 1 + i, (1 + i) / 4, rho_max, curvature) for i in range(10)]  # epochs of 4 steps
    between = {"step": 4, "epoch": 1.0, "split": "val", "acc1": 50.0}
    broken = {**lines[5], "grad_norm": None}
    write(tmp_path, [*lines[:4], between, *lines[4:5], broken, *lines[6:]])
    found = radius(tmp_path)
    assert found["epochs"] == [1, 2, 3]
    assert (found["steps"], found["last_step"]) == (9, 10)
    of_epochs = [lines[:4], [lines[4], *lines[6:8]], lines[8:]]
    for i, steps in enumerate(of_epochs):
        rhos = [step["rho"] for step in steps]
        assert found["rho"]["mean"][i] == pytest.approx(sum(rhos) / len(rhos))
        assert (found["rho"]["min"][i], found["rho"]["max"][i]) == (min(rhos), max(rhos))
        second = [0.5 * curvature * rho**2 for rho in rhos]
        assert found["beyond_first_order"]["mean"][i] == pytest.approx(sum(second) / len(second), abs=1e-12)
        assert found["beyond_first_order"]["max"][i] == pytest.approx(max(second), abs=1e-12)
        over = [s["perturbed_loss"] - s["loss"] - s["sigma"] for s in steps]
        assert found["over_budget"]["min"][i] == pytest.approx(min(over), abs=1e-12)
        uncapped = [s["sigma"] / s["grad_norm"] for s in steps]
        assert found["uncapped"]["max"][i] == pytest.approx(max(uncapped))
        assert found["capped"][i] == sum(u > rho_max for u in uncapped) / len(steps)


def test_a_method_without_a_budget_has_no_budget_terms(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    lines = [logged(draw, 1 + i, (1 + i) / 4, 0.1, 2.0) for i in range(4)]
    for line in lines:
        del line["sigma"]
    write(tmp_path, lines)
    found = radius(tmp_path)
    assert "rho" in found
    assert not {"over_budget", "uncapped", "capped"} & found.keys()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "has no metrics.jsonl: name the folder of a run"),
        ([], "has no training step"),
        ([{"step": 1, "epoch": 1.0, "split": "val", "loss": 1.0}], "has no training step"),
        ([{"step": 1, "epoch": 1.0, "split": "train", "loss": 1.0, "grad_norm": 1.0}], "has no perturbed_loss"),
    ],
)
def test_a_log_that_cannot_be_used_is_named(
    lines: list[dict[str, Any]] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if lines is not None:
        write(tmp_path, lines)
    with pytest.raises(UserError, match=message):
        radius(tmp_path)
    assert run(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "analysis").exists()


def run(*argv: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lesam-dist", "radius", *map(str, argv)])
        with pytest.raises(SystemExit) as stopped:
            cli.run("analyze")
    return int(stopped.value.code or 0)


def test_the_command_writes_numbers_and_pictures(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(seed)
    lines = [logged(draw, 1 + i, (1 + i) / 4, 0.1, 2.0) for i in range(8)]
    write(tmp_path, lines)
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "radius that was applied" in out
    document = json.loads((tmp_path / "analysis" / "radius.json").read_text())
    assert document["results"] == radius(tmp_path)
    assert (tmp_path / "analysis" / "radius.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "analysis" / "radius.svg").read_text()
    write(tmp_path, [*lines, logged(draw, 9, 2.25, 0.1, 2.0)])  # the run went on
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "analysis" / "radius.json").read_text())["results"]["epochs"] == [1, 2, 3]
