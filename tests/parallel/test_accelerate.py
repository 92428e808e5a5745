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


@pytest.mark.parametrize(("name", "kind"), [("ddp", "Parameter"), ("fsdp2", "DTensor")])
def test_own_loop(seed: int, tmp_path: Path, name: str, kind: str) -> None:
    """As the file is, and then in the same processes as the launcher would have it with bf16 in the file."""
    text = (ROOT / "launch" / "accelerate" / f"{name}.yaml").read_text()
    (tmp_path / "launch.yaml").write_text(text.replace("num_processes: 8", "num_processes: 2"))
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
    for precision in ("no", "bf16"):  # accelerate refuses fp16 without a GPU
        assert (tmp_path / f"{precision}_rank1").exists(), result.stderr
        for rank in range(2):
            actual = pickle.loads((tmp_path / f"{precision}_rank{rank}").read_bytes())
            assert (actual["kind"], actual["world"], actual["precision"]) == (kind, 2, precision)
            assert_on_path(actual["weights"], seed, "lesam-sgd", "fp32" if precision == "no" else precision)
