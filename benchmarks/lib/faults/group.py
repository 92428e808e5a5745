"""Starts the processes of a run from a server that has imported everything, and ends them as torchrun does."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from lib import ROOT
from lib.faults import inside
from lib.faults.inside import Start
from lib.faults.network import Link

_LOOK = 0.02  # seconds between two looks at the processes
_MONITOR = 0.1  # seconds, as torchrun's --monitor-interval
_KILL_AFTER = 30.0  # seconds between torchrun's SIGTERM and its SIGKILL
Event = dict[str, Any]


@dataclass
class Outcome:
    """How a start ended.

    Attributes:
        statuses: by rank; negative ones are signals. None: had to be killed by the harness.
        struck: the events of the actions that took place.
        complaint: what was wrong with how it ended, if anything.
        outputs: stdout and stderr by rank.
        seconds: from the start to the last end.
    """

    statuses: list[int | None]
    struck: list[Event]
    complaint: str | None
    outputs: list[str]
    seconds: float


@dataclass
class Watch:
    """What the parent does while the processes run.

    Attributes:
        as_torchrun: when one ends with a failure, the others are sent SIGTERM, and SIGKILL 30 s later; else they are
            left to find out by themselves.
        limit: seconds that a start may take, and that survivors may take to find out.
        on_event: called for each action that struck, with the group.
        signals: (seconds after the start, number, ranks) of signals from outside.
    """

    as_torchrun: bool = True
    limit: float = 90.0
    on_event: Callable[[Event, Group], None] | None = None
    signals: list[tuple[float, int, list[int]]] = field(default_factory=list)


class Group:
    """The processes of one start."""

    def __init__(self, processes: list[BaseProcess], start: Start) -> None:
        self.processes, self.start = processes, start

    def send(self, number: int, ranks: list[int] | None = None) -> bool:
        """A signal to these ranks, or all, as far as they live; whether any did."""
        any_lives = False
        for rank in range(len(self.processes)) if ranks is None else ranks:
            process = self.processes[rank]
            if process.exitcode is None and process.pid is not None:
                any_lives = True
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        return any_lives

    def statuses(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]


class Server:
    """Forks runs from a process that has all modules, so that a start costs no import."""

    def __init__(self) -> None:
        # By it the server and its children find the modules, also where Python forgets to tell them sys.path.
        path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("TRITON_INTERPRET", "1")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lib.faults.warm"])

    def run(self, start: Start, world_size: int, watch: Watch, hosts: Link | None = None) -> Outcome:
        """Start, watch to the end, and say how it ended. With ``hosts`` each of two processes is on its own."""
        began = time.monotonic()
        with self._group(start, world_size, watch.as_torchrun and hosts is None, hosts) as group:
            complaint = _watch(group, watch)
            statuses = group.statuses()
        outputs = [_text(start.output(rank)) for rank in range(world_size)]
        return Outcome(statuses, events(start), complaint, outputs, time.monotonic() - began)

    @contextmanager
    def _group(self, start: Start, world_size: int, has_agent: bool, hosts: Link | None) -> Iterator[Group]:
        """The processes; whatever is left of them at the end is killed.

        ``has_agent``: the store is the launcher's, as torchrun's is, and outlives rank 0.
        """
        errors = start.folder / f"errors-{start.number}"
        errors.mkdir(exist_ok=True)
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if has_agent else None
        common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "faults"}
        common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port if store else _free_port())}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": str(has_agent), "TORCHELASTIC_RESTART_COUNT": "0"}
        if hosts:
            common |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": hosts.address}
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            environ = common | {"RANK": str(rank), "LOCAL_RANK": "0" if hosts else str(rank)}
            environ["TORCHELASTIC_ERROR_FILE"] = str(errors / str(rank) / "error")
            if hosts:
                environ["GLOO_SOCKET_IFNAME"] = hosts.interfaces[rank]
            host = hosts.names[rank] if hosts else None
            processes.append(self._context.Process(target=inside.enter, args=(rank, environ, start, host)))
        group = Group(processes, start)
        try:
            for process in processes:
                process.start()
            yield group
        finally:
            group.send(signal.SIGKILL)
            for process in processes:
                if process.pid is not None:
                    process.join()


def events(start: Start) -> list[Event]:
    """The actions that have struck so far."""
    return [json.loads(line) for line in _text(start.events).splitlines()]


def _watch(group: Group, watch: Watch) -> str | None:
    began = time.monotonic()
    signals = sorted(watch.signals)
    seen = 0
    failed_at: float | None = None
    told = False
    while None in group.statuses():
        time.sleep(_LOOK)
        now = time.monotonic() - began
        while signals and signals[0][0] <= now:
            _, number, ranks = signals.pop(0)
            group.send(number, ranks)
        if watch.on_event is not None:
            struck = events(group.start)
            for event in struck[seen:]:
                watch.on_event(event, group)
            seen = len(struck)
        if failed_at is None and any(status not in (None, 0) for status in group.statuses()):
            failed_at = now
        if failed_at is not None and watch.as_torchrun:
            if not told and now - failed_at > _MONITOR:
                group.send(signal.SIGCONT)
                group.send(signal.SIGTERM)
                told = True
            if now - failed_at > _KILL_AFTER:
                return f"ranks {_living(group)} were still there {_KILL_AFTER:g} s after torchrun's SIGTERM"
        elif failed_at is not None and now - failed_at > watch.limit:
            return f"ranks {_living(group)} did not notice in {watch.limit:g} s that another had ended"
        elif now > watch.limit and failed_at is None:
            return f"nothing ended within {watch.limit:g} s: {_dumps(group)}"
    return None


def _living(group: Group) -> str:
    return ", ".join(str(rank) for rank, status in enumerate(group.statuses()) if status is None)


def _dumps(group: Group) -> str:
    """Where each process stands, if it can say so."""
    return "; ".join(
        f"rank {rank} in {_text(Path(f'/proc/{process.pid}/wchan'))}"
        for rank, process in enumerate(group.processes)
        if process.exitcode is None
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
    return port
