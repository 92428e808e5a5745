"""A signal to any process stops all after one step, in time; and what else a person or a batch system does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch

from lesam_dist import parallel
from lesam_dist.errors import PREEMPTED, PreemptedError
from lesam_dist.parallel.agreed import Agreed
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.signals import STOP_SIGNALS
from lesam_dist.train.preemption import preemption
from tests.parallel import processes
from tests.parallel.terminal import launch, see_signals, srun_like, torchrun_like


def alone() -> Distributed:
    return Distributed(0, 0, 1, torch.device("cpu"), agreed=Agreed())


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    world = alone()
    with preemption(world, 60):
        assert not world.agreed.stopping
        for _ in range(3):  # torchrun and Slurm may both pass it on
            os.kill(os.getpid(), number)
        until(lambda: world.agreed.stopping)
        assert (world.agreed.due(1), world.agreed.reason) == ("stop", number.name)
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    said = capfd.readouterr().err
    assert said.count(f"lesam-dist: {number.name}: the run saves after this step and stops.") == 1
    assert said.count("lesam-dist") == 1
    assert ("Ctrl-C again" in said) == (number is signal.SIGINT)


def test_where_signals_are_another_ones(capfd: pytest.CaptureFixture[str]) -> None:
    """In a dry run, in another thread of a larger program, and where whoever started the process ignores one."""
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    def within(active: bool) -> None:
        with preemption(alone(), 60, active=active):
            assert [signal.getsignal(each) for each in STOP_SIGNALS] == before

    within(False)
    thread = threading.Thread(target=within, args=(True,))
    thread.start()
    thread.join()
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        world = alone()
        with preemption(world, 60):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: world.agreed.stopping)
            assert world.agreed.reason == "SIGUSR1"
    finally:
        signal.signal(signal.SIGINT, old)


def stays_too_long(err: Path) -> None:
    _stderr(err)
    with preemption(alone(), 0.3):
        os.kill(os.getpid(), signal.SIGUSR2)
        threading.Event().wait()


def gets_ctrl_c(err: Path) -> None:
    """Three: the second is the first one passed on, the third is meant."""
    _stderr(err)
    world = alone()
    with preemption(world, 300):
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: world.agreed.stopping)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.2)
        os.write(2, b"still here\n")
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()


def _stderr(err: Path) -> None:
    see_signals()
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


@pytest.mark.parametrize(
    ("function", "status", "last"),
    [
        (stays_too_long, PREEMPTED, r"the run has not ended within checkpoint.grace_seconds (0.3 s), being at wait ("),
        (gets_ctrl_c, 130, "lesam-dist: interrupted again: ending at once, without saving."),
    ],
)
def test_a_process_that_does_not_end_is_ended(
    tmp_path: Path, function: Callable[[Path], None], status: int, last: str
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    process = context.Process(target=function, args=(tmp_path / "err",))
    process.start()
    process.join(300)
    process.kill()
    err = (tmp_path / "err").read_text()
    assert process.exitcode == status, err
    lines = err.splitlines()
    assert last in lines[-1]
    assert len(lines) == (2 if function is stays_too_long else 3)


def one_is_signalled(rank: int) -> None:
    with parallel.process_group("cpu", 300) as world, preemption(world, 60):
        for step in count(1):
            world.barrier()
            if step == 5 and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if world.agreed.due(step) == "stop":
                world.barrier()
                raise PreemptedError(f"stopped by {world.agreed.reason} after step N")


def one_is_gone(rank: int) -> None:
    """As where a batch system signals all, and ends one of them before the others have saved."""
    with parallel.process_group("cpu", 300) as world, preemption(world, 60):
        world.barrier()
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: world.agreed.stopping)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()


def one_is_late(rank: int) -> None:
    """Rank 1 waits in a collective that rank 0 has left."""
    with parallel.process_group("cpu", 300) as world, preemption(world, 60):
        if rank == 0:
            world.agreed.request("stop", "SIGTERM")
            raise PreemptedError("stopped by SIGTERM after step 9")
        until(lambda: world.agreed.stopping)
        world.barrier()


@pytest.mark.parametrize(
    ("function", "statuses", "lines"),
    [
        (
            one_is_signalled,
            [PREEMPTED, PREEMPTED],
            ["SIGUSR1 to rank 1: the run", "SIGUSR1 to rank 1 after"],
        ),
        (one_is_gone, [PREEMPTED, -9], ["SIGTERM: the run saves", "stopped by SIGTERM, and other processes had left"]),
        (one_is_late, [PREEMPTED, PREEMPTED], ["SIGTERM: the run saves", "stopped by SIGTERM after step 9"]),
    ],
)
def test_all_stop_together(
    tmp_path: Path, function: Callable[[int], None], statuses: list[int], lines: list[str]
) -> None:
    """The lines come once, from rank 0, and none is an error."""
    found, err = launch(function, tmp_path, torchrun_like)
    assert found == statuses, err
    said = [line for line in err.splitlines() if line.startswith("lesam-dist")]
    if function is not one_is_gone:  # where rank 0 has no signal, it may be gone before its thread has looked
        said = [lines[0], *said][-2:]
    assert len(said) == 2, err
    for line, wanted in zip(said, lines, strict=True):
        assert wanted in line, err
    assert "error" not in err
    assert "Traceback" not in err


def one_is_signalled_under_a_script(rank: int) -> None:
    os.environ["LESAM_DIST_PREEMPTED"] = "told"
    one_is_signalled(rank)


def test_a_launch_script_is_told_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun, between the two, takes any status but 0 for a failure."""
    monkeypatch.chdir(tmp_path)
    Path("told").touch()
    with preemption(alone(), 60), monkeypatch.context() as patch:
        assert Path("told").exists()
        patch.setenv("LESAM_DIST_PREEMPTED", "told")
        with preemption(alone(), 60):
            assert not Path("told").exists(), "it was of processes before these"
    found, err = launch(one_is_signalled_under_a_script, tmp_path, srun_like)
    assert found == [0, 0], err
    assert Path("told").exists()
