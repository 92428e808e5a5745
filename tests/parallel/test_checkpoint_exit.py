"""Processes that wrote checkpoints beside their training end as others do: gloo can abort an interpreter that exits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from lesam_dist import LESAM
from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.parallel.processes import process_group
from lesam_dist.train.checkpoint import Checkpointer

with process_group("cpu", 200) as world:
    net = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 3))
    for part in [*net, net]:
        fully_shard(part)
    optimizer = LESAM(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    checkpointer = Checkpointer(Path(sys.argv[1]), world, CheckpointConfig(asynchronous="always"))

    def closure():
        loss = net(torch.randn(8, 8)).square().mean()
        loss.backward()
        return loss

    for step in range(1, 6):
        optimizer.step(closure)
        assert checkpointer.save(step, net, optimizer, {})
    assert checkpointer.wait()
"""


@pytest.mark.full
def test_ten_exits_are_clean(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        command = [*launcher, str(tmp_path / "script.py"), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert "terminate" not in done.stderr
        assert (folder / "latest").read_text() == "step_00000005"
