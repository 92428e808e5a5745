"""What every thread of a process is doing: on SIGQUIT, when a run does not get on, and when a process crashes."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from datetime import datetime

from lesam_dist.parallel.place import Place
from lesam_dist.parallel.progress import Progress

_PIPE = 2**20  # bytes: what the signal's handler writes at once, while no thread can read
_QUIET = 0.2  # seconds without another frame after which the stacks are whole


def dump_on_signals(place: Place) -> None:
    """From now on a crash of this process prints the stacks of all its threads to stderr, and so does SIGQUIT, after
    which it goes on.

    The stacks that SIGQUIT asks for are taken at once, in whatever code the process is, and printed as one piece behind
    a line with rank and host, so that those of several processes do not mix.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a program of its own has replaced it
        return
    faulthandler.enable(descriptor)
    if not hasattr(faulthandler, "register"):  # Windows
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
    faulthandler.register(signal.SIGQUIT, file=writing, all_threads=True)
    header = _header(place, "SIGQUIT").encode()

    def pass_on() -> None:
        while text := os.read(reading, _PIPE):
            # The handler writes each frame by itself, and another thread may read while it does.
            while select.select([reading], [], [], _QUIET)[0]:
                text += os.read(reading, _PIPE)
            os.write(descriptor, header + text)

    threading.Thread(target=pass_on, name="stacks", daemon=True).start()


def dump(place: Place, progress: Progress) -> None:
    """Write what all threads are doing to the run's folder of stacks, or to stderr where there is none yet."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = _header(place, str(progress.at)) + file.read().decode(errors="replace")
    if progress.stacks is not None:
        with suppress(OSError):  # a full disk
            progress.stacks.mkdir(parents=True, exist_ok=True)
            with open(progress.stacks / file_name(place.rank), "a") as into:
                into.write(text + "\n")
            return
    print(text, file=sys.stderr, flush=True)


def file_name(rank: int) -> str:
    """Of what a process writes into the run's folder of stacks."""
    return f"rank_{rank}.txt"


def _header(place: Place, why: str) -> str:
    now = datetime.now().isoformat(" ", "seconds")
    return f"lesam-dist: stacks of rank {place.rank} on {socket.gethostname()}, process {os.getpid()} ({why}), {now}:\n"
