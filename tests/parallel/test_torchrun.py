"""Real torchrun: a run that is asked to stop has saved, and one that lost a process goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *flags: str, **environ: str) -> subprocess.Popen[str]:
    """The launch script, two processes on the CPU; it and all below it write to FOLDER/out."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"NPROC_PER_NODE": "2", "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), **environ}
    run_dir = ("--run_dir", str(folder / "run"), "--parallel.device", "cpu")
    with open(folder / "out", "w") as out:
        return subprocess.Popen(
            ["bash", ROOT / "launch" / "torchrun.sh", *flags, *run_dir],
            env=clean | own,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
        )


def until(condition: Callable[[], object], script: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert script.poll() is None, (folder / "out").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(folder: Path) -> list[int]:
    """The steps of the training lines in the run's log."""
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if record["split"] == "train"]


def rank_1_of(script: subprocess.Popen[str]) -> int | None:
    """The process of rank 1 below a script."""
    for process in Path("/proc").iterdir():
        try:
            environ = (process / "environ").read_bytes() if process.name.isdigit() else b""
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1] if environ else ""
            above = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1] if parent else ""
        except OSError:
            continue
        if above == str(script.pid) and b"\0RANK=1\0" in environ:
            return int(process.name)
    return None


def test_all_save_and_the_script_says_so(small: tuple[str, ...], tmp_path: Path) -> None:
    script = torchrun(tmp_path, *small, "--epochs", "2000", "--checkpoint.every_epochs", "2000")
    until(lambda: len(steps(tmp_path)) > 1, script, tmp_path)
    script.send_signal(signal.SIGUSR1)
    script.wait(600)
    out = (tmp_path / "out").read_text()
    assert script.returncode == 75, out
    assert out.count("lesam-dist: SIGTERM: the run saves after this step and stops.") == 1, out
    stopped = re.findall(r"^lesam-dist: stopped by SIGTERM after step (\d+): go on with --resume auto\.$", out, re.M)
    assert len(stopped) == 1, out
    assert (tmp_path / "run" / "checkpoints" / f"step_{int(stopped[0]):08d}").is_dir()
    assert "lesam-dist: error" not in out
    assert "forcefully exiting" not in out


@pytest.mark.full  # `test_run_lock.py` and `test_launch.py` have its parts
def test_a_killed_process_is_replaced_and_the_run_goes_on(small: tuple[str, ...], tmp_path: Path) -> None:
    """Without --resume auto, which a user of torchrun --max-restarts does not write."""
    script = torchrun(tmp_path, *small, "--epochs", "8", "--checkpoint.every_steps", "1", MAX_RESTARTS="1")
    until(lambda: len(steps(tmp_path)) > 2, script, tmp_path)
    rank_1 = rank_1_of(script)
    assert rank_1 is not None
    os.kill(rank_1, signal.SIGKILL)
    script.wait(240)
    out = (tmp_path / "out").read_text()
    assert script.returncode == 0, out
    assert out.count("started again by torchrun: going on with the run in") == 1, out
    assert steps(tmp_path) == list(range(1, 25)), "each step once"
