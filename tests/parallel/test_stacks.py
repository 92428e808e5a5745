"""SIGQUIT shows what every thread of a process is doing, and harms nothing; a job may be stopped, and go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lesam_dist import parallel
from tests.parallel.terminal import launch, torchrun_like

TIMEOUT = 2.0


def asks_both(rank: int) -> None:
    """Rank 1 asks while rank 0 waits in a collective, whose code runs no signal handler of Python's."""
    with parallel.process_group("cpu", 60) as world:
        pids = world.gather(os.getpid())
        if rank == 1:
            time.sleep(0.2)  # rank 0 has gone on to the barrier, most likely; either way the test holds
            for pid in pids:
                os.kill(pid, signal.SIGQUIT)
            while Path("stderr").read_text().count("lesam-dist: stacks of rank") < 2:
                time.sleep(0.02)
        world.barrier()


def test_sigquit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    statuses, err = launch(asks_both, tmp_path, torchrun_like)
    assert statuses == [0, 0], err
    pieces = re.split(r"lesam-dist: stacks of ", err)
    assert pieces[0] == ""
    assert len(pieces) == 3, "one each"
    for piece in pieces[1:]:
        rank = int(piece.split()[1])
        assert piece.startswith(f"rank {rank} on {socket.gethostname()}, process ")
        assert " in asks_both\n" in piece
        assert piece.count(" in _talk\n") == 1, "of one process, with all its threads"
    assert sorted(piece.split()[1] for piece in pieces[1:]) == ["0", "1"]


def steps(rank: int) -> None:
    with parallel.process_group("cpu", TIMEOUT) as world:
        Path(f"pid{rank}").write_text(str(os.getpid()))
        for step in range(40):
            world.move("pass 1", step)
            dist.all_reduce(torch.ones(2))
            time.sleep(0.02 * (rank + 1))


class Stopped(threading.Thread):
    """Stops both processes for longer than they may keep each other waiting, one a little later than the other."""

    def run(self) -> None:
        files = [Path("pid0"), Path("pid1")]
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.01)
        pids = [int(file.read_text()) for file in files]
        for number, pause in ((signal.SIGSTOP, 2.5 * TIMEOUT), (signal.SIGCONT, 0)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(pause)


def test_a_job_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `scontrol suspend` does, or a laptop's lid: time in which nobody runs is nobody's delay."""
    monkeypatch.chdir(tmp_path)
    stopped = Stopped()
    stopped.start()
    statuses, err = launch(steps, tmp_path, torchrun_like)
    stopped.join()
    assert (statuses, err) == ([0, 0], "")
