"""The launch scripts: signals reach the processes, and statuses come back. What they start is a stand-in, but once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

TORCHRUN = """#!/usr/bin/env bash
echo "$@" > arguments; env > environment
{action}
"""
# As torchrun 2.9 to 2.14 does: TERM and INT are handed on, with status 1 in the end; USR1 and USR2 end it alone.
AGENT = """
trap 'echo TERM >> got; [ -z "{saves}" ] || : > "$LESAM_DIST_PREEMPTED"; exit 1' TERM
trap 'echo INT >> got; exit 1' INT
touch ready; while :; do sleep 0.02; done
"""
SRUN = """#!/usr/bin/env bash
echo "$@" >> arguments
for name in USR1 TERM; do trap "echo $name >> got; exit $(cat asked)" $name; done
read -r now < statuses; sed -i 1d statuses
[ "$now" = wait ] || exit "$now"
touch ready; while :; do sleep 0.02; done
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Runs a launch script where the programs that a test has written come first."""
    monkeypatch.chdir(tmp_path)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}

    def call(script: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        own = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RESTART_SECONDS": "0", **environ}
        return subprocess.Popen(
            ["bash", LAUNCH / script, *arguments],
            env=clean | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return call


def program(name: str, text: str) -> None:
    Path(name).write_text(text)
    Path(name).chmod(0o755)


def until_there(file: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not Path(file).exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
@pytest.mark.parametrize("saves", ["yes", ""])
def test_torchrun_is_told_once(start: Callable[..., subprocess.Popen[str]], name: str, saves: str) -> None:
    """The whole group gets the signal, as from a terminal, and the script's status says whether the run can go on."""
    program("torchrun", TORCHRUN.format(action=AGENT.format(saves=saves)))
    script = start("torchrun.sh", "--config", "a b")
    until_there("ready", script)
    os.killpg(script.pid, getattr(signal, f"SIG{name}"))
    out, _ = script.communicate(timeout=300)
    assert script.returncode == (75 if saves else 1), out
    assert Path("got").read_text() == "TERM\n"
    folder = re.search("^LESAM_DIST_PREEMPTED=(.*)/preempted$", Path("environment").read_text(), re.M)
    assert folder is not None
    assert not Path(folder[1]).exists()


def test_ctrl_c_again_ends_it_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    program("torchrun", TORCHRUN.format(action="trap 'touch told' TERM; touch ready; while :; do sleep 0.02; done"))
    script = start("torchrun.sh")
    until_there("ready", script)
    os.killpg(script.pid, signal.SIGINT)
    until_there("told", script)
    os.killpg(script.pid, signal.SIGINT)  # at the same time: as a shell and torchrun pass one on
    time.sleep(2.1)
    assert script.poll() is None
    os.killpg(script.pid, signal.SIGINT)
    script.communicate(timeout=300)  # which ends when nothing is left
    assert script.returncode == 130


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({}, "--standalone --max-restarts 0 --nproc-per-node auto -m lesam_dist.train --x y"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MAX_RESTARTS": "2", "NPROC_PER_NODE": "4"},
            "--nnodes 2 --node-rank 1 --master-addr a --master-port 29500 --max-restarts 2 --nproc-per-node 4 "
            "-m lesam_dist.train --x y",
        ),
        (
            {"NNODES": "1:4", "MASTER_ADDR": "a", "SLURM_JOB_ID": "77"},
            "--nnodes 1:4 --rdzv-backend c10d --rdzv-endpoint a:29500 --rdzv-id 77 --max-restarts 3 "
            "--nproc-per-node auto -m lesam_dist.train --resume auto --x y",
        ),
    ],
)
def test_torchrun_gets(start: Callable[..., subprocess.Popen[str]], environ: dict[str, str], flags: str) -> None:
    program("torchrun", TORCHRUN.format(action="exit 3"))
    script = start("torchrun.sh", "--x", "y", **environ)
    script.communicate(timeout=300)
    assert script.returncode == 3
    assert Path("arguments").read_text().strip() == flags
    variables = Path("environment").read_text().splitlines()
    assert {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30"} <= set(variables)


def slurm(statuses: list[str], asked: str = "75", state: str = "RUNNING") -> None:
    """A Slurm whose job steps end with these statuses, and with ``asked`` after a signal."""
    Path("statuses").write_text("".join(f"{status}\n" for status in statuses))
    Path("asked").write_text(asked)
    program("srun", SRUN)
    program("squeue", f'#!/bin/sh\necho "$@" >> asked_about\necho {state}\n')
    program("scontrol", '#!/bin/sh\necho "$@" >> requeued\n')


@pytest.mark.parametrize("name", ["USR1", "TERM"])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_slurm_requeues_what_it_stopped(start: Callable[..., subprocess.Popen[str]], name: str, state: str) -> None:
    """But for a job that scancel has ended."""
    slurm(["wait"], state=state)
    script = start("slurm.sbatch", "--config", "digits", SLURM_JOB_ID="12")
    until_there("ready", script)
    script.send_signal(getattr(signal, f"SIG{name}"))
    out, _ = script.communicate(timeout=300)
    assert script.returncode == 75, out
    assert Path("got").read_text() == f"{name}\n"
    assert Path("arguments").read_text() == "--kill-on-bad-exit=1 lesam-dist train --config digits --resume auto\n"
    assert Path("requeued").exists() == (state == "RUNNING")
    if state == "RUNNING":
        assert Path("requeued").read_text() == "requeue 12\n"


@pytest.mark.parametrize(
    ("statuses", "status", "steps"),
    [
        (["0"], 0, 1),
        (["2", "0"], 2, 1),  # a wrong flag is wrong again
        (["137", "1", "0"], 0, 3),
        (["137", "75"], 75, 2),  # the tasks alone were signalled, as --signal does
        (["1"] * 5, 1, 4),
    ],
)
def test_slurm_restarts(
    start: Callable[..., subprocess.Popen[str]], statuses: list[str], status: int, steps: int
) -> None:
    slurm(statuses)
    script = start("slurm.sbatch", SLURM_JOB_ID="12")
    out, _ = script.communicate(timeout=300)
    assert script.returncode == status, out
    assert len(Path("arguments").read_text().splitlines()) == steps
    assert Path("requeued").exists() == (status == 75)


def test_slurm_does_not_restart_what_failed_when_it_was_stopped(start: Callable[..., subprocess.Popen[str]]) -> None:
    slurm(["wait", "0"], asked="1")
    script = start("slurm.sbatch", SLURM_JOB_ID="12")
    until_there("ready", script)
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=300)
    assert script.returncode == 1
    assert not Path("requeued").exists()


@pytest.mark.parametrize("flags", [["--run_dir", "/all runs/x"], ["--run_dir", "old", "--run_dir=/all runs/x"]])
def test_slurm_array_trains_a_seed_a_task(start: Callable[..., subprocess.Popen[str]], flags: list[str]) -> None:
    """In a folder of its own, the last --run_dir's; and what is requeued is the task, not the array."""
    slurm(["75"])
    program("srun", SRUN.replace('"$@"', '"$(printf \'[%s]\' "$@")"'))
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    script = start("slurm.sbatch", "--config", "digits", *flags, **array)
    out, _ = script.communicate(timeout=300)
    assert script.returncode == 75, out
    *_, seed, number, run_dir, folder, resume, auto = re.findall(r"\[(.*?)\]", Path("arguments").read_text())
    assert [seed, number, run_dir, folder] == ["--seed", "3", "--run_dir", "/all runs/x/seed_3"]
    assert [resume, auto] == ["--resume", "auto"]
    assert "--jobs 12_3 " in Path("asked_about").read_text()
    assert Path("requeued").read_text() == "requeue 12_3\n"


def test_slurm_array_needs_a_folder(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Else all seeds would train in the recipe's one."""
    slurm(["0"])
    array = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}
    script = start("slurm.sbatch", "--config", "digits", **array)
    out, _ = script.communicate(timeout=300)
    assert (script.returncode, out.count("\n")) == (2, 1)
    assert "an array of seeds needs --run_dir DIR" in out
    assert not Path("arguments").exists()
