"""Direct launches: what reaches the driver is what Triton's own front end would have sent."""

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

from lesam_kernels import TensorTable, sum_sq
from tests.kernels.cases import table_of

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a stub of CUDA's driver with gcc")
KERNELS = {"_sum_sq", "_dots", "_perturb", "_stats", "_skip", "_restore", "_restore_sgd", "_restore_adamw"}


@pytest.fixture(scope="module")
def stubbed() -> dict[str, Any]:
    return launch_stubbed()


def launch_stubbed(**environment: str) -> dict[str, Any]:
    """What tests/kernels/launch_stubbed.py prints, in a process of its own."""
    command = [sys.executable, "-m", "tests.kernels.launch_stubbed"]
    settings = {**os.environ, **environment}
    settings.pop("TRITON_INTERPRET", None)
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=root)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_driver_sees_the_same_launch(stubbed: dict[str, Any]) -> None:
    """Compiled kernel, grid and every parameter, of every kernel with and without what is optional."""
    assert {launch["kernel"].removesuffix("_kernel") for launch in stubbed["launches"]} == KERNELS
    for launch in stubbed["launches"]:
        (seen, front_end), (first, _), (again, again_front_end) = (launch[way] for way in ("plain", "first", "again"))
        assert seen[2] == launch["arguments"]
        assert first == again == seen
        assert (front_end, again_front_end) == (1, 0)


def test_calls_share_a_compiled_kernel_where_triton_shares_it(stubbed: dict[str, Any]) -> None:
    """A pointer off 16 bytes, another dtype, a large integer, a pointer that is there, integers 1, 16 and 17."""
    plain, direct = stubbed["specialisations"]["plain"], stubbed["specialisations"]["direct"]
    assert direct == plain
    assert plain[:9] == plain[9:]
    assert len({handle for (handle,) in plain}) == 8


def test_profilers_and_settings_are_honoured(stubbed: dict[str, Any]) -> None:
    others = stubbed["others"]
    assert others["first, then direct"] == [1, 0]
    assert others["hooked"] == [0, ["_probe_kernel", "_probe_kernel"]]
    assert others["pre-run hook"] == 1
    assert others["debug"] == [1, 0]
    assert others["unknown version"] == [1, 1]


def test_the_interpreter_launches_plainly(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("compiled here")
    w = [torch.ones(3)]
    table: TensorTable = table_of(w, g=w)
    assert [sum_sq(table, "g").item() for _ in range(2)] == [3.0, 3.0]
    assert not table.launch._compiled
