"""That the processes of a group live, and why one failed: all hear of it, also while a collective waits for ever.

Two threads: one talks to the group's store, which may stop answering; the other does not, and ends a process that
nothing else would end, as under NCCL, whose collectives do not notice that a process has died.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.beats import Beat, Look, RunningClock, behind
from lesam_dist.parallel.board import Board, Failure
from lesam_dist.parallel.meeting import Member, store_of_agent
from lesam_dist.parallel.place import Place
from lesam_dist.parallel.progress import Progress
from lesam_dist.parallel.report import is_kept, name_of, report_failure, report_once
from lesam_dist.parallel.stall import StallWatch

_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|failed to (recv|send)|ncclRemoteError|remote process exited"
    r"|timed out|(wait|socket|operation) timeout",
    re.IGNORECASE,
)
_WARN_AFTER = 60.0  # seconds
_TICK = 1.0  # seconds between two beats
_SEARCH = 5.0  # seconds in which the process that a collective has lost is looked for
_FAREWELL = 10.0  # seconds after another one's failure in which a process leaves by itself, or else is ended
_PATIENT_FAREWELL = 60.0  # where all have the same reason to leave, and each will
_KILLED = "killed (out of memory? see dmesg there), or crashed (see its output)"


class PeerError(UserError):
    """This process has no fault: another one failed, or is lost."""

    def __init__(self, message: str, same_node: bool) -> None:
        super().__init__(message)
        self.same_node = same_node  # which says itself what happened


class Peers:
    """The other processes of the group.

    Args:
        store: that all share.
        members: all processes by rank.
        place: this process.
        progress: of this process.
        timeout: seconds after which a run ends in which one process keeps the others waiting.
    """

    def __init__(
        self, store: Store, members: Sequence[Member], place: Place, progress: Progress, timeout: float
    ) -> None:
        self._board = Board(store, place.rank, place.world_size)
        self._members, self._place, self._progress, self._timeout = members, place, progress, timeout
        self._warn_after, self._tick = min(_WARN_AFTER, timeout / 2), min(_TICK, timeout / 8)
        mine = (members[place.rank].host, members[place.rank].space)
        self._siblings = [rank for rank, member in enumerate(members) if (member.host, member.space) == mine]
        self._number = 0  # of the last beat
        self._failure: Failure | None = None  # why the run ends, once that is known
        self._timed_out = False  # the collective that broke
        self._known, self._lost, self._over, self._wake = (threading.Event() for _ in range(4))
        self._threads = [
            threading.Thread(target=self._talk, name="peers", daemon=True),
            threading.Thread(target=self._guard, name="peers_guard", daemon=True),
        ]
        self._hook_before: Callable[[threading.ExceptHookArgs], Any] | None = None

    def start(self) -> None:
        """Begin to tell the others that this process lives, and to watch whether they do."""
        for thread in self._threads:
            thread.start()
        self._hook_before, threading.excepthook = threading.excepthook, self._thread_failed

    def stop(self) -> None:
        """Stop telling and watching."""
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_TICK)
        if self._hook_before is not None:
            threading.excepthook, self._hook_before = self._hook_before, None

    def is_over(self) -> bool:
        """Whether the run is known to end by one process's failure: the store may go with the process that has it."""
        return self._failure is not None and not self._failure.shared

    def part(self) -> None:
        """After a failure: if the store ends with this process, wait a little until all others have read there why."""
        if self._place.rank != 0 or store_of_agent():
            return
        until = time.monotonic() + _SEARCH  # of another host's process that is lost nothing is heard
        while not all(map(self._knows, range(1, len(self._members)))) and time.monotonic() < until:
            time.sleep(_TICK / 20)

    def _knows(self, rank: int) -> bool:
        """Whether a process has read why the run ends, or is past that."""
        return self._board.has_acknowledged(rank) or self._members[rank].state() == "gone"

    def publish(self, error: BaseException) -> None:
        """Tell the others why this process is about to leave; the first failure stands."""
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failure = Failure(self._place.rank, f"failed: {message}", said=True, shared=isinstance(error, SharedError))
        # In a thread: if the store's host has gone, nothing answers.
        thread = threading.Thread(target=self._stand, args=(failure,), name="publish", daemon=True)
        thread.start()
        thread.join(_SEARCH)

    def explain(self, error: Exception) -> Exception:
        """What to raise for an exception in this process: itself, or a `PeerError` where it only lost another."""
        if isinstance(error, UserError) or not (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            self.publish(error)
            return error
        self._timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        self._lost.set()
        self._wake.set()
        self._known.wait(_SEARCH + 2 * _TICK)
        if self._failure is not None:
            return self._peer_error(self._failure)
        reason = str(error).strip().splitlines()[0]
        if "connectFullMesh" in reason:  # gloo: each process gives the others an address of its own
            found = UserError(
                f"the processes do not reach each other ({reason}). Set GLOO_SOCKET_IFNAME, on every host, to the "
                "network interface that the others reach it by, e.g. eth0; /etc/hosts may call the host 127.0.0.1."
            )
            self.publish(found)
            return found
        return PeerError(
            f"lost another process (in {self._progress.at}), and none knows which: it took longer than "
            f"parallel.timeout_s ({self._timeout:g} s), or the network broke ({reason})",
            same_node=False,
        )

    def _stand(self, failure: Failure) -> Failure:
        """Publish; returns what stands, or this where the store has gone."""
        try:
            standing = self._board.publish(failure)
            self._board.acknowledge()
        except RuntimeError:
            return failure
        return standing

    def _peer_error(self, failure: Failure) -> PeerError:
        who, said = "", False
        if failure.rank is not None:
            who = f"{self._name(failure.rank)} "
            said = failure.said and self._members[failure.rank].host == self._members[self._place.rank].host
        return PeerError(f"stopped, as {who}{failure.message}", same_node=said)

    def _name(self, rank: int) -> str:
        return name_of(rank, self._members[rank].host, self._place.world_size > self._place.local_world_size)

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """A thread has failed, and what waits for it may wait for ever: the hook before this one ends the process."""
        if args.exc_value is not None and not is_kept(args):
            self.publish(args.exc_value)
            self.part()
        if self._hook_before is not None:
            self._hook_before(args)

    def _talk(self) -> None:
        clock = RunningClock(longest=5 * self._tick)
        stall = StallWatch(
            self._board, self._members, self._place, self._progress, self._warn_after, self._timeout, clock
        )
        search: _Search | None = None
        try:
            while not self._over.is_set():
                self._number += 1
                self._board.tell(Beat(self._number, self._progress.at))
                failure = self._board.failure() or self._find_gone()
                if failure is None and self._lost.is_set():
                    search = search or _Search(self._place.world_size, self._timed_out)
                    failure = search.look(self._board.beats())
                    failure = failure and self._board.publish(failure)
                if failure is not None:
                    self._learn(failure)
                    self._board.acknowledge()
                    return
                if stall.over():
                    _exit(1)  # the main thread waits in a collective
                self._wake.wait(self._tick) if not self._lost.is_set() else self._over.wait(self._tick / 4)
        except RuntimeError:
            if self._failure is None:
                self._learn(self._without_store())

    def _learn(self, failure: Failure) -> None:
        if not self._over.is_set():
            self._failure = failure
            self._known.set()

    def _find_gone(self) -> Failure | None:
        """Whether a process of this host has ended, and not said why."""
        for rank in self._siblings:
            if self._members[rank].state() == "gone" and not self._over.is_set():
                at = self._board.beats()[rank].at
                return self._board.publish(Failure(rank, f"is gone ({at}): {_KILLED}"))
        return None

    def _without_store(self) -> Failure:
        """Why the store may have gone."""
        keeper = self._keeper()
        # A process that has been killed closes its connections a little before it is gone.
        until = time.monotonic() + _TICK
        while not store_of_agent() and self._members[0].state() == "" and time.monotonic() < until:
            self._over.wait(_TICK / 20)
        if not store_of_agent() and self._members[0].state() == "gone":
            return Failure(0, f"is gone, which kept the store: {_KILLED}")
        return Failure(None, f"{keeper} has closed the store at {self._place.address}: it failed, or was killed")

    def _keeper(self) -> str:
        return "torchrun's first node" if store_of_agent() else self._name(0)

    def _guard(self) -> None:
        clock, answered, since = RunningClock(longest=5 * self._tick), 0, 0.0
        warned = False
        while not self._over.wait(self._tick):
            now = clock.now()
            if self._failure is not None:
                if not self._over.wait(_PATIENT_FAREWELL if self._failure.shared else _FAREWELL):
                    self._leave(self._peer_error(self._failure), 2)
                return
            if answered != self._number:
                answered, since = self._number, now
            silence = f"{self._keeper()}, which keeps the store at {self._place.address}, does not answer"
            if now - since >= self._timeout:
                limit = f"for {self._timeout:g} s (parallel.timeout_s)"
                remedy = "its host is lost, it is stopped, or the network between is cut"
                self._leave(PeerError(f"stopped ({self._progress.at}), as {silence} {limit}: {remedy}", False), 1)
            if now - since >= self._warn_after and not warned and self._place.local_rank < 2:
                warned = True
                print(f"lesam-dist: warning: for {now - since:.0f} s {silence}.", file=sys.stderr, flush=True)

    def _leave(self, error: PeerError, status: int) -> NoReturn:
        if not error.same_node:
            report_failure(self._place, error)
        if self._progress.resume:
            report_once(self._place, f"go on with: {self._progress.resume}")
        _exit(status)


class _Search:
    """After a broken collective: who gives no sign of life, or, after one that timed out, who is behind."""

    def __init__(self, world_size: int, timed_out: bool) -> None:
        self._look, self._clock = Look(world_size, 0.8 * _SEARCH), RunningClock(longest=_TICK)
        self._timed_out = timed_out

    def look(self, beats: Sequence[Beat]) -> Failure | None:
        now = self._clock.now()
        if silent := self._look.silent(beats, now):
            at = beats[silent[0]].at
            return Failure(silent[0], f"has given no sign of life for {now:.0f} s ({at}): cut off, {_KILLED}")
        if self._timed_out and now >= 0.8 * _SEARCH and (late := behind(beats)):
            return Failure(late[0], f"took longer than parallel.timeout_s ({beats[late[0]].at})")
        return None


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(status)
