"""`accelerator.prepare(model, LESAM(...))` on two processes, under DDP and FSDP2, follows the float64 Algorithm 1."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.processes import free_port
from tests.parallel.test_optimizers import assert_on_path

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("precision", ["no", "bf16"])  # accelerate refuses fp16 without a GPU
@pytest.mark.parametrize(("name", "kind"), [("ddp", "Parameter"), ("fsdp2", "DTensor")])
def test_own_loop(seed: int, tmp_path: Path, name: str, kind: str, precision: str) -> None:
    text = (ROOT / "launch" / "accelerate" / f"{name}.yaml").read_text()
    text = text.replace("num_processes: 8", "num_processes: 2")
    (tmp_path / "launch.yaml").write_text(text.replace("mixed_precision: 'no'", f"mixed_precision: '{precision}'"))
    script = Path(__file__).with_name("accelerate_loop.py")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")),
            *("--main_process_port", str(free_port())),
            *(str(script), str(seed), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "rank1").exists(), result.stderr
    for rank in range(2):
        actual = pickle.loads((tmp_path / f"rank{rank}").read_bytes())
        assert (actual["kind"], actual["world"], actual["precision"]) == (kind, 2, precision)
        assert_on_path(actual["weights"], seed, "lesam-sgd", "fp32" if precision == "no" else precision)
