"""`accelerator.prepare(model, LESAM(...))` on two processes, under DDP and FSDP2, follows the float64 Algorithm 1."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_optimizers import expected

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "kind"), [("ddp", "Parameter"), ("fsdp2", "DTensor")])
def test_own_loop(seed: int, tmp_path: Path, name: str, kind: str) -> None:
    text = (ROOT / "launch" / "accelerate" / f"{name}.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    (tmp_path / "launch.yaml").write_text(text)
    script = Path(__file__).with_name("accelerate_loop.py")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")),
            *(str(script), str(seed), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)]), "OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "rank1").exists(), result.stderr
    weights, _ = expected(seed, "lesam-sgd")
    for rank in range(2):
        actual = pickle.loads((tmp_path / f"rank{rank}").read_bytes())
        assert (actual["kind"], actual["world"]) == (kind, 2)
        for key, value in weights.items():
            scale = np.abs(value).max()
            # float32, as in test_optimizers.
            np.testing.assert_allclose(actual["weights"][key] / scale, value / scale, rtol=0, atol=2e-5)
