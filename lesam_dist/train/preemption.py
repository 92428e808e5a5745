"""How a run ends when a signal asks it to: after a step that all processes agree on, saved, and in time."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.signals import STOP_SIGNALS, forget_preemption, preempted_status

_AGAIN = 1.0  # seconds after which another Ctrl-C is meant: torchrun passes the first on, twice within milliseconds
_LOOK = 0.5  # seconds between two looks for what other processes were asked
_OVER = b"\0"  # no signal has this number
_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def preemption(world: Distributed, grace: float, *, active: bool = True) -> Iterator[None]:
    """Within, a signal (SIGTERM, SIGINT, SIGUSR1, SIGUSR2) to any process asks all of them to stop.

    `Distributed.agreed` says when it is time. A process that has not left ``grace`` seconds later is ended with status
    `PREEMPTED`, with a line that says what it was at. A second Ctrl-C ends it at once, with status 130.

    Signals are seen by a thread, from the descriptor that the interpreter writes them to, since the main thread may
    wait in a collective, and runs no handler there. A signal that was ignored before still is.

    Args:
        world: this process among all.
        grace: seconds from the first signal, to whichever process, to the end.
        active: false does nothing, as does a call from another thread than the main one, which alone may handle
            signals: there, as in a dry run, they do what they did before.
    """
    if not active or threading.current_thread() is not threading.main_thread():
        yield
        return
    forget_preemption()
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    taken = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    taken = {number: handler for number, handler in taken.items() if handler not in (signal.SIG_IGN, None)}
    watch = threading.Thread(target=_Watch(world, grace, reads).run, name="preemption", daemon=True)
    watch.start()
    descriptor = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        for number in taken:
            signal.signal(number, _nothing)
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.write(writes, _OVER)
        watch.join()
        os.close(reads)
        os.close(writes)


def _nothing(number: int, frame: object) -> None:
    """A handler of this language, so that the interpreter writes the signal's number to the descriptor."""


class _Watch:
    """The thread that sees the signals of this process, and what the others were asked.

    Args:
        world: this process among all.
        grace: seconds.
        reads: descriptor to read signals from, a byte each.
    """

    def __init__(self, world: Distributed, grace: float, reads: int) -> None:
        self._world, self._grace, self._reads = world, grace, reads
        self._since: float | None = None  # when this process learned that the run is to stop

    def run(self) -> None:
        """See to it until `_OVER` is read."""
        while True:
            ready, _, _ = select.select([self._reads], [], [], _LOOK)
            received = os.read(self._reads, 512) if ready else b""
            for number in received:
                if number in STOP_SIGNALS:
                    self._receive(signal.Signals(number))
            if _OVER[0] in received:
                return
            if self._since is None and self._world.agreed.stopping:
                self._begin()
            elif self._since is not None and time.monotonic() - self._since >= self._grace:
                self._end_late()

    def _receive(self, number: signal.Signals) -> None:
        if self._since is None:
            where = f" to rank {self._world.rank}" if self._world.rank else ""
            self._world.agreed.request("stop", f"{number.name}{where}")
            self._begin()
        elif number is signal.SIGINT and time.monotonic() - self._since >= _AGAIN:
            if self._world.is_main:
                self._say("interrupted again: ending at once, without saving.")
                if self._world.progress.resume:
                    self._say(f"go on from the last checkpoint with {self._resume()}")
            _leave(130)

    def _begin(self) -> None:
        self._since = time.monotonic()
        if self._world.is_main:
            reason = self._world.agreed.reason or "asked to stop"
            again = " Ctrl-C again ends it at once." if reason.startswith("SIGINT") else ""
            self._say(f"{reason}: the run saves after this step and stops.{again}")

    def _end_late(self) -> NoReturn:
        name = f"rank {self._world.rank}" if self._world.world_size > 1 else "the run"
        self._say(
            f"{name} has not ended within checkpoint.grace_seconds ({self._grace:g} s), being at "
            f"{_main_thread_is_at()}: it is ended. Go on from the last checkpoint with {self._resume()}"
        )
        _leave(preempted_status())

    def _resume(self) -> str:
        return self._world.progress.resume or "--resume auto."

    def _say(self, text: str) -> None:
        # Not by print, whose lock the main thread may hold for ever: a terminal that is stopped, a pipe that is full.
        os.write(2, f"\nlesam-dist: {text}\n".encode() if sys.stderr.isatty() else f"lesam-dist: {text}\n".encode())


def _leave(status: int) -> NoReturn:
    os._exit(status)  # the main thread may wait in a collective, which nothing else ends


def _main_thread_is_at() -> str:
    """What the main thread does: its innermost function of this package, and what that waits in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    stack = traceback.extract_stack(frame)
    inner = stack[-1]
    own = [call for call in stack if call.filename.startswith(_PACKAGE)]
    if not own:
        return f"{inner.name} ({inner.filename}:{inner.lineno})"
    call = own[-1]
    text = f"{call.name} ({Path(call.filename).relative_to(_PACKAGE)}:{call.lineno})"
    return text if call is inner else f"{text}, in {inner.name}"
