"""One run at a time in a folder, also where the file system has no locks; and whose run it was."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lesam_dist.config.command_line import parse
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import run_lock
from lesam_dist.train.run_dir import claim
from lesam_dist.train.run_lock import Holder, Lock
from tests.parallel import processes

ON_A_SERVER = "another-host"


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


@pytest.fixture(params=["locks", "no locks"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "lockf", no_locks)
    return tmp_path / ".lock"


def quiet(text: str) -> None:
    raise AssertionError(text)


def elsewhere(function: Callable[..., None], *args: Any) -> multiprocessing.context.ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    process = context.Process(target=function, args=args)
    process.start()
    return process


def take(file: Path, locks: bool, until_refused: int) -> None:
    """Hold the lock until so many others have been refused, or say that this one was."""
    if not locks:
        fcntl.lockf = no_locks  # type: ignore[assignment]
    try:
        lock = Lock(file, quiet)
    except UserError:
        file.with_name(f"refused-{os.getpid()}").touch()
        return
    file.with_name(f"got-{os.getpid()}").touch()
    while len(list(file.parent.glob("refused-*"))) < until_refused:
        time.sleep(0.01)
    lock.release()


def test_who_has_it_is_said_and_a_killed_one_lets_go(file: Path) -> None:
    locks = fcntl.lockf is not no_locks
    other = elsewhere(take, file, locks, 1)
    try:
        while not list(file.parent.glob("got-*")):
            assert other.is_alive()
            time.sleep(0.01)
        year = time.strftime("%Y", time.gmtime())
        with pytest.raises(UserError, match=rf"in use by another run \(process {other.pid} on .*, since {year}-.*wait"):
            Lock(file, quiet)
    finally:
        other.kill()
        other.join()
    said: list[str] = []
    Lock(file, said.append).release()
    assert len(said) == (0 if locks else 1)
    assert all(f"was in use by process {other.pid} on" in text and "taking it over" in text for text in said)
    Lock(file, quiet).release()
    record = json.loads(file.read_text())
    assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())
    assert sorted(path.name for path in file.parent.iterdir() if "lock" in path.name) == [".lock"]


def test_of_several_at_one_time_one_has_it(file: Path) -> None:
    locks = fcntl.lockf is not no_locks
    others = [elsewhere(take, file, locks, 3) for _ in range(4)]
    for other in others:
        other.join(300)
    assert [other.exitcode for other in others] == [0] * 4
    assert len(list(file.parent.glob("got-*"))) == 1


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of a run where the file system has no locks."""
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    lock = Lock(tmp_path / ".lock", quiet)
    content = (tmp_path / ".lock.held").read_text()
    lock.release()
    (tmp_path / ".lock.held").write_text(content)
    return tmp_path / ".lock.held"


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "age", "stale"),
    [
        ({}, 1e6, False),  # this very process; it may have been stopped for a while
        ({"started": 1}, 0, True),  # its pid belongs to another process now
        ({"boot": ["another", "namespace"]}, 0, True),
        ({"host": ON_A_SERVER}, 100, False),
        ({"host": ON_A_SERVER}, 1000, True),
        (None, 100, False),  # created, and about to be written
        (None, 1000, True),
    ],
)
def test_when_a_record_is_stale(held: Path, fields: dict[str, Any] | None, age: float, stale: bool) -> None:
    if fields is None:
        held.write_text("")
    else:
        change(held, **fields)
    then = time.time() - age
    os.utime(held, (then, then))
    said: list[str] = []
    if stale:
        Lock(held.with_name(".lock"), said.append).release()
        assert len(said) == 1
    else:
        with pytest.raises(UserError, match="in use by another run"):
            Lock(held.with_name(".lock"), quiet)
        assert held.exists()


def test_another_pid_namespace_is_as_another_host(held: Path) -> None:
    """Two containers on one host: a pid of one says nothing in the other."""
    boot = json.loads(held.read_text())["boot"]
    change(held, pid=2**22 + 1, boot=[boot[0], "pid:[1]"])
    with pytest.raises(UserError, match="in use by another run"):
        Lock(held.with_name(".lock"), quiet)


def test_a_holder_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(run_lock, "_TOUCH", 0.01)
    lock = Lock(tmp_path / ".lock", quiet)
    os.utime(tmp_path / ".lock.held", (1, 1))
    while (tmp_path / ".lock.held").stat().st_mtime == 1:
        time.sleep(0.01)
    lock.release()
    assert not (tmp_path / ".lock.held").exists()


AGENT = """
import os, subprocess, sys
for environ in sys.argv[2:]:
    variables = dict(pair.split("=") for pair in environ.split(",") if pair)
    print(subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, **variables}, text=True,
                         capture_output=True, check=True).stdout.strip(), flush=True)
"""
WORKER = """
import sys; from pathlib import Path; from lesam_dist.train.run_lock import Holder, Lock
before = Holder.read(Path(".lock"))
print(before is not None and before.is_restarting)
Lock(Path(".lock"), print)
"""


def started_by(folder: Path, *environs: str) -> list[bool]:
    """Processes that one launcher starts one after the other, by their environments: whether each is a restart."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", AGENT, WORKER, *environs]
    lines = subprocess.run(command, cwd=folder, env=clean, check=True, capture_output=True, text=True).stdout.split()
    return [{"True": True, "False": False}[line] for line in lines]


def test_whose_restart_it_is(tmp_path: Path) -> None:
    none, again = "TORCHELASTIC_RUN_ID=none", "TORCHELASTIC_RESTART_COUNT=1"
    # A restart after a failure, and one because nodes came or went, which torchrun does not count.
    assert started_by(tmp_path, none, f"{none},{again}", none) == [False, True, True]
    # Another torchrun, of the same name, that has restarted too.
    assert started_by(tmp_path, f"{none},{again}") == [False]
    # By a name of one's own it may be another node's.
    assert started_by(tmp_path, "TORCHELASTIC_RUN_ID=mine") == [False]
    assert started_by(tmp_path, f"TORCHELASTIC_RUN_ID=mine,{again}", "", "") == [True, False, False]
    assert started_by(tmp_path, f"TORCHELASTIC_RUN_ID=other,{again}") == [False]


def resume_of(world: Distributed, folder: str) -> list[str | None]:
    """What every rank resumes, in a folder that holds a run: not its own, and then its own."""
    config = parse(["--config", "digits", "--run_dir", f"{folder}/run"])
    os.environ |= {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}
    found: list[str | None] = []
    for run_id in ("b", "a"):
        if world.is_main:
            record = Holder.me()
            (Path(folder) / "run" / ".lock").write_text(json.dumps({**vars(record), "run_id": run_id, "agent": ""}))
        try:
            if world.is_main or run_id == "a":  # rank 0 alone finds that out, and the others lose it
                claim(config, world).release()
        except UserError as error:
            if "already holds a run" not in str(error):
                raise
        found.append(config.resume)
    return found


def test_a_restarted_run_goes_on_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert processes.run(resume_of, 2, str(tmp_path)) == [[None, "auto"], [None, "auto"]]
