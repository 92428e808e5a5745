"""How the processes of a run meet, before there is a process group: a store that all share, and who has come."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.place import Place
from lesam_dist.parallel.report import name_of, some_of

_WARN_AFTER = 60.0  # seconds
_PAUSE = 0.05  # seconds between two looks at who has come; ten times that where there are many


@dataclass(frozen=True)
class Member:
    """A process of the run: its host, and its number in one of the host's spaces of process ids."""

    host: str
    space: str
    pid: int

    def state(self) -> str:
        """What a process of the same host sees of it: "gone", "stopped", or "" for all else and where none can tell."""
        mine = this_member()
        if (mine.host, mine.space) != (self.host, self.space) or not self.space:
            return ""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "gone"
        except (OSError, IndexError):
            return ""
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "")


def this_member() -> Member:
    """This process."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        space = ""
    return Member(socket.gethostname(), space, os.getpid())


def store_of_agent() -> bool:
    """Whether torchrun keeps the store, on its first node, and not the process of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(place: Place, timeout_s: float) -> tuple[Store, list[Member]]:
    """Connect to the store that all processes share, torchrun's or one of rank 0, and wait until all have come.

    Returns:
        The store, and all processes by rank.

    Raises:
        SharedError: some have not come within ``timeout_s``; they are named.
        UserError: the store cannot be reached, or made.
    """
    deadline = time.monotonic() + timeout_s
    warn_after = min(_WARN_AFTER, timeout_s / 2)
    host, _, port = place.address.replace("[", "").replace("]", "").rpartition(":")  # of IPv6
    keeps = place.rank == 0 and not store_of_agent()
    if not keeps:
        _await_port(place, host, int(port), timeout_s, warn_after)
    left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        connection = TCPStore(host, int(port), None, keeps, left, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{_could_not_meet(place, timeout_s)}: {reason}") from error
    connection.set_timeout(timedelta(seconds=timeout_s))
    # torchrun's store may outlive a restart.
    store = PrefixStore(f"lesam_dist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", connection)
    return store, _await_all(store, place, timeout_s, deadline, warn_after)


def _could_not_meet(place: Place, timeout_s: float) -> str:
    return f"could not meet the other {place.world_size - 1} processes at {place.address} within {timeout_s:g} s"


def _await_port(place: Place, host: str, port: int, timeout_s: float, warn_after: float) -> None:
    """Wait until the store's keeper listens; torch's own attempts print its stack."""
    begun, warned = time.monotonic(), False
    keeper = "torchrun's first node" if store_of_agent() else "rank 0"
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, timeout_s)).close()
            return
        except OSError as error:
            waited, reason = time.monotonic() - begun, error.strerror or str(error)
        if waited >= timeout_s:
            raise SharedError(
                f"{_could_not_meet(place, timeout_s)}: {keeper}, which is the one to listen there, does not answer "
                f"({reason}). It has failed or hangs, or this host cannot reach it: see its output; MASTER_ADDR and "
                "MASTER_PORT must be its own, and no firewall may lie between."
            )
        if waited >= warn_after and not warned and place.local_rank == 0:
            warned = True
            _print_warning(f"for {waited:.0f} s {keeper} has not answered at {place.address} ({reason}).")
        time.sleep(10 * _PAUSE)


def _await_all(store: Store, place: Place, timeout_s: float, deadline: float, warn_after: float) -> list[Member]:
    mine, keys = this_member(), [f"member/{rank}" for rank in range(place.world_size)]
    begun, warned = time.monotonic(), False
    try:
        store.set(keys[place.rank], json.dumps([mine.host, mine.space, mine.pid]))
        while not store.check(keys):
            now = time.monotonic()
            if now >= deadline or store.check(["verdict"]):
                _give_up(store, place, f"{_could_not_meet(place, timeout_s)}: {_missing(store, keys)}.")
            if now - begun >= warn_after and not warned:
                warned = True
                if store.add("said/missing", 1) == 1:
                    _print_warning(f"for {now - begun:.0f} s the others have waited: {_missing(store, keys)}.")
            time.sleep(_PAUSE if place.world_size <= 16 else 10 * _PAUSE)
        members = [Member(*json.loads(text)) for text in store.multi_get(keys)]
    except RuntimeError as error:
        keeper = "torchrun's first node" if store_of_agent() else "rank 0"
        raise SharedError(
            f"lost {keeper}, which keeps the store at {place.address}, before all {place.world_size} processes had "
            f"met: see its output. ({str(error).strip().splitlines()[0]})"
        ) from error
    return members


def _give_up(store: Store, place: Place, verdict: str) -> NoReturn:
    """Raise the same on all who have come, though they came at different times."""
    verdict = store.compare_set("verdict", "", verdict).decode()
    if place.rank == 0 and not store_of_agent():
        time.sleep(40 * _PAUSE)  # the store ends with this process: let the others read it
    raise SharedError(verdict)


def _missing(store: Store, keys: list[str]) -> str:
    ranks = [rank for rank, key in enumerate(keys) if not store.check([key])]
    names = some_of([name_of(rank, "", several_hosts=False) for rank in ranks])
    return f"{names} {'has' if len(ranks) == 1 else 'have'} not come (failed, ended, or hanging: see the output there)"


def _print_warning(text: str) -> None:
    print(f"lesam-dist: warning: {text}", file=sys.stderr, flush=True)
