"""A process may fail in any way and at any time: the terminal names it, and none of the others stays behind."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lesam_dist import parallel
from lesam_dist.errors import UserError
from lesam_dist.parallel.board import Board, Failure
from tests.parallel.terminal import launch, srun_like, torchrun_like

PHASES = ("before joining", "after joining", "first step", "in the middle", "alone", "in a thread", "after the group")
SILENT: dict[str, tuple[Callable[[], object], int]] = {  # what says nothing, and with which status it ends
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "abort": (os.abort, -signal.SIGABRT),
    "segfault": (lambda: ctypes.string_at(0), -signal.SIGSEGV),
    "leave": (lambda: os._exit(0), 0),
}
SAID = {
    "bug": "\nValueError: a bug of our own",
    "user": "disk is full",
    "exit": "sys.exit(0) was called in the middle of a run of several processes",
    "memory": "\nMemoryError",
}
FAULTS = (*SILENT, *SAID)
TIMEOUT = 8.0


def fail(fault: str) -> None:
    if fault in SILENT:
        SILENT[fault][0]()
    if fault == "user":
        raise UserError("disk is full")
    if fault == "exit":
        sys.exit(0)
    raise ValueError("a bug of our own") if fault == "bug" else MemoryError


def works(rank: int) -> None:
    """A run in small: what fails where stands in the file `plan`."""
    plan = json.loads(Path("plan").read_text())

    def reach(phase: str) -> None:
        if (rank, phase) == (plan["rank"], plan["phase"]):
            fail(plan["fault"])

    reach("before joining")
    with parallel.process_group("cpu", plan["timeout"]) as world:
        reach("after joining")
        for step in range(5):
            world.move("pass 1", step)
            reach("first step" if step == 0 else "in the middle" if step == 3 else "")
            dist.all_reduce(torch.ones(3))
        world.move("evaluating")
        reach("alone")
        if plan["phase"] == "alone":
            time.sleep(300)  # no collective tells the others
        if plan["phase"] == "in a thread":
            thread = threading.Thread(target=reach, args=("in a thread",), name="writer")
            thread.start()
            time.sleep(300 if rank == plan["rank"] else 0)
        world.barrier()
    reach("after the group")


def check(
    folder: Path, world_size: int, culprit: int, phase: str, fault: str, like: Callable[..., dict[str, str]]
) -> None:
    timeout = TIMEOUT if phase == "before joining" else 60
    plan = {"rank": culprit, "phase": phase, "fault": fault, "timeout": timeout}
    print(plan)
    (folder / "plan").write_text(json.dumps(plan))
    statuses, err = launch(works, folder, like, world_size, others=45)
    print(statuses, err)
    others = [status for rank, status in enumerate(statuses) if rank != culprit]
    if phase == "after the group":  # the others have what they came for
        assert others == [0] * len(others)
    else:
        assert all(status in (1, 2) for status in others), "an error, and none had to be killed"
    exits_alone = fault == "exit" and phase in ("before joining", "after the group")
    if fault in SILENT or exits_alone:
        assert statuses[culprit] == (0 if exits_alone else SILENT[fault][1])
    else:
        assert statuses[culprit] == (2 if fault == "user" else 1)
        assert err.count(f"{SAID[fault]}\n") == 1
        assert f"error: {f'rank {culprit}: ' * (culprit > 0)}" in err
    if fault in ("abort", "segfault"):
        assert "Fatal Python error" in err
        assert ", line " in err, "its stack"
    lines = [line for line in err.splitlines() if line.startswith("lesam-dist: error")]
    if phase == "before joining" and culprit == 0:
        assert any("rank 0, which is the one to listen there, does not answer" in line for line in lines)
    elif phase == "before joining":
        assert any(f"rank {culprit} has not come" in line for line in lines)
    elif phase == "after the group":
        assert len(lines) == (fault in SAID and not exits_alone)
    elif fault in SILENT:
        assert len(lines) == 1
        assert f"rank {culprit} is gone" in lines[0]
    else:
        assert len(lines) == 1, "said once"
    if culprit:  # else the store goes with rank 0, and threads of others may still be asking it
        assert "frame #" not in err, "torch's account"


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_fault_at_any_time(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    for phase in draw.sample(PHASES, 2):
        like = draw.choice([torchrun_like, srun_like])
        faults = [
            fault for fault in FAULTS if (phase, fault) != ("in a thread", "exit")
        ]  # which ends that thread alone
        check(tmp_path, world_size, draw.randrange(world_size), phase, draw.choice(faults), like)


def reads_late(rank: int) -> None:
    """On a machine with too much to do rank 2 looks at what the others say a second later than they do."""
    if rank == 2:
        look = Board.failure

        def late(board: Board) -> Failure | None:
            time.sleep(1)
            return look(board)

        Board.failure = late  # type: ignore[method-assign]
    works(rank)


def test_rank_0_does_not_take_the_store_from_who_has_not_read_it(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = {"rank": 1, "phase": "in the middle", "fault": random.Random(seed).choice(list(SILENT)), "timeout": 60}
    Path("plan").write_text(json.dumps(plan))
    statuses, err = launch(reads_late, tmp_path, srun_like, 3, others=45)
    assert (statuses[0], statuses[2]) == (2, 2)
    (line,) = (line for line in err.splitlines() if line.startswith("lesam-dist: error"))
    assert "rank 1 is gone" in line
