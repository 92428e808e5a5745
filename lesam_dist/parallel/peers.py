"""What the processes of a group tell each other besides their collectives: that they live, and why one failed.

Everything goes through the group's store, so it works while a collective waits for a process that will never come.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from lesam_dist.errors import UserError
from lesam_dist.parallel.place import Place
from lesam_dist.parallel.report import name_of

_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|failed to (recv|send)|ncclRemoteError|remote process exited"
    r"|timed out waiting|(wait|socket|operation) timeout",
    re.IGNORECASE,
)
_FAILURE = "failure"
_WARN_AFTER = 60.0  # seconds
_TICK = 1.0  # seconds between two beats
_FAREWELL = 30.0  # seconds after another one's failure in which a process leaves by itself, or else is ended


class PeerError(UserError):
    """This process has no fault: another one failed, or is lost."""

    def __init__(self, message: str, same_node: bool) -> None:
        super().__init__(message)
        self.same_node = same_node  # which says itself what happened


class Peers:
    """The other processes of the group.

    Args:
        store: of the group; a connection of its own is made.
        place: this process.
        timeout: seconds after which a run whose process is silent ends.
    """

    def __init__(self, store: Store, place: Place, timeout: float) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store may outlive a restart
        self._store = PrefixStore(f"lesam_dist/{attempt}", store.clone())
        self._place, self._timeout = place, timeout
        self._warn_after = min(_WARN_AFTER, timeout / 2)
        self._host = socket.gethostname()
        self._position = 0
        self._known: dict[str, Any] | None = None  # why another process failed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Begin to tell the others that this process lives, and to watch whether they do."""
        self._tell(0)
        self._thread.start()

    def stop(self) -> None:
        """Stop telling and watching."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_TICK)

    def part(self) -> None:
        """After `publish`: if the store ends with this process, wait until the others have had time to read it."""
        if self._place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * _TICK)

    def move(self) -> None:
        """Say that this process has got on by one part of a step; costs nothing."""
        self._position += 1

    def publish(self, error: BaseException) -> None:
        """Tell the others why this process is about to leave; the first failure stands."""
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failure = {"rank": self._place.rank, "host": self._host, "message": message}
        try:
            self._store.compare_set(_FAILURE, "", json.dumps(failure))
        except RuntimeError:  # the store's host has gone before
            return

    def explain(self, error: Exception) -> Exception:
        """What to raise for an exception in this process: itself, or a `PeerError` where it only lost another."""
        if isinstance(error, UserError) or not (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            self.publish(error)
            return error
        failure = self._failure()
        if failure is None:
            reason = str(error).strip().splitlines()[0]
            return PeerError(
                f"lost another process, which did not say why: it was killed (out of memory?), is stopped, took longer "
                f"than parallel.timeout_s ({self._timeout:g} s), or the network broke ({reason})",
                same_node=False,
            )
        name = name_of(failure["rank"], failure["host"], self._several_hosts)
        return PeerError(f"stopped, as {name} failed: {failure['message']}", failure["host"] == self._host)

    @property
    def _several_hosts(self) -> bool:
        return self._place.world_size > self._place.local_world_size

    def _failure(self) -> dict[str, Any] | None:
        if self._known is not None:
            return self._known
        try:
            if self._store.check([_FAILURE]):
                found: dict[str, Any] = json.loads(self._store.get(_FAILURE))
                return found
        except RuntimeError:
            pass
        return None

    def _tell(self, beat: int) -> None:
        self._store.set(f"beat/{self._place.rank}", f"{beat} {self._position} {self._host}")

    def _watch(self) -> None:
        looks = self._place.local_rank < 2  # the second speaks where the first is silent
        look = _Look(self._place.world_size, self._warn_after)
        beat = 0
        try:
            while not self._over.wait(min(_TICK, self._timeout / 8)):
                beat += 1
                self._tell(beat)
                self._known = self._failure()
                if self._known is not None:
                    break
                waits = look.waits(self._position, time.monotonic())
                if looks and waits >= self._warn_after / 2:
                    self._judge(look, waits)
        except RuntimeError:
            return  # the store has gone, and with it the run: the collectives say so
        if not self._over.wait(_FAREWELL):
            os._exit(2)  # under NCCL the main thread waits for the one that failed

    def _judge(self, look: _Look, waits: float) -> None:
        texts = self._store.multi_get([f"beat/{rank}" for rank in range(self._place.world_size)])
        beats = [text.decode().split(" ", 2) for text in texts]
        now = time.monotonic()
        silent = look.silent([int(beat) for beat, _, _ in beats], now)
        behind = look.behind([int(position) for _, position, _ in beats])
        if waits < self._warn_after or not (silent or behind):
            return

        def names(ranks: list[int]) -> str:
            return ", ".join(name_of(rank, beats[rank][2], self._several_hosts) for rank in ranks)

        no_step = f"no step for {waits:.0f} s"
        where = min(int(position) for _, position, _ in beats)
        if not silent:
            self._say(f"{where}/{behind}", f"warning: {no_step}: {names(behind)} is behind, and the others wait.")
        elif waits < self._timeout:
            self._say(f"{where}/{silent}", f"warning: {no_step}: {names(silent)} is silent (stopped, or cut off?).")
        else:
            limit = f"parallel.timeout_s is {self._timeout:g}"
            self._say("end", f"error: {no_step}, {limit}: {names(silent)} is silent (stopped, or cut off?).")
            os._exit(1)  # the main thread waits in a collective

    def _say(self, key: str, text: str) -> None:
        """Print a line, unless a process has printed the one of this key."""
        if self._store.add(f"said/{key}", 1) == 1:
            print(f"lesam-dist: {text}", file=sys.stderr, flush=True)


class _Look:
    """Finds who holds the others up.

    It is given, again and again, each process's beat, which counts up while the process lives, and its position, which
    counts the parts of steps that it has done.
    """

    def __init__(self, world_size: int, patience: float) -> None:
        self._patience = patience
        self._position, self._since = -1, 0.0
        self._beats = [-1] * world_size
        self._changed = [0.0] * world_size

    def waits(self, position: int, now: float) -> float:
        """Seconds since this process last got on."""
        if position != self._position:
            self._position, self._since = position, now
            self._beats = [-1] * len(self._beats)
        return now - self._since

    def silent(self, beats: list[int], now: float) -> list[int]:
        """The ranks whose beat has stood still for at least half of ``patience``."""
        for rank, beat in enumerate(beats):
            if beat != self._beats[rank]:
                self._beats[rank], self._changed[rank] = beat, now
        return [rank for rank, changed in enumerate(self._changed) if now - changed >= self._patience / 2]

    def behind(self, positions: list[int]) -> list[int]:
        """The ranks at the lowest position, where not all are at the same."""
        lowest = min(positions)
        return [] if lowest == max(positions) else [rank for rank, at in enumerate(positions) if at == lowest]
