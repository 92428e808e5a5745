"""A step launches, allocates and waits as the table says, and a default one asks for nothing but its launches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cost_meter import Meter, Waits

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a stub of CUDA's driver with gcc")

MODULE = "tests.optim.step_counts"
TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("step_counts.json").read_text())
SAME_TORCH = TABLE["torch"] == torch.__version__.split("+")[0]
OF_TORCH = ("operations", "allocations")  # what torch's own functions are made of is up to its version


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """Counted anew, in a process of its own: where kernels are interpreted, none is launched."""
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", MODULE, "--print"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    steps: dict[str, Any] = json.loads(done.stdout)["steps"]
    return steps


@pytest.mark.parametrize("wrapping", ["single", "ddp", "fsdp2"])
def test_counts_are_those_of_the_table(wrapping: str, counted: dict[str, Any]) -> None:
    def comparable(rows: dict[str, Any]) -> dict[str, Any]:
        return {
            name: [{key: step[key] for key in step if SAME_TORCH or key not in OF_TORCH} for step in steps]
            for name, steps in rows.items()
        }

    rewrite = f"what a step asks for changed; `python -m {MODULE}` writes the table anew, for a change that is meant"
    assert comparable(counted[wrapping]) == comparable(TABLE["steps"][wrapping]), rewrite


@pytest.mark.parametrize("wrapping", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("setting", ["default", "AdamW", "two groups", "lesam+", "sam", "asam", "msam", "esam"])
def test_a_step_is_four_launches(setting: str, wrapping: str, counted: dict[str, Any]) -> None:
    """Two norms, a perturbation and an update; sharded norms are two all-reduces. Nothing else runs on the device."""
    (step,) = counted[wrapping][setting]
    assert (step["launches"], step["operations"], step["waits"]) == (4, {}, 0)
    assert step["collectives"] == (2 if wrapping == "fsdp2" else 0)


def test_nothing_waits_for_the_device(counted: dict[str, Any]) -> None:
    waits = {
        (wrapping, name): step["waits"]
        for wrapping, rows in counted.items()
        for name, steps in rows.items()
        for step in steps
    }
    assert set(waits.values()) == {0}


def test_what_is_counted() -> None:
    """Waits that are operators and waits that are not; new memory, but not views of old memory."""
    with Meter() as meter, Waits() as waits:
        a, b = torch.ones(3), torch.zeros(3)
        calls = [
            (lambda: a.sum().item(), 1, 1),
            (lambda: bool(a.sum() > 0), 1, 2),
            (lambda: float(a[0]), 1, 0),
            (lambda: a.tolist(), 1, 0),
            (lambda: a.cpu(), 1, 0),
            (lambda: a + b, 0, 1),
            (lambda: torch.empty(5), 0, 1),
            (lambda: a.add_(b), 0, 0),
            (lambda: a[1:].view(-1, 1).detach(), 0, 0),
        ]
        for number, (call, waited, allocated) in enumerate(calls):
            meter.clear()
            waits.clear()
            call()
            assert (meter.reads + waits.total(), meter.allocations) == (waited, allocated), number
