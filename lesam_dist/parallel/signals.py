"""The signals that ask a run to end, and who sees them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lesam_dist.errors import PREEMPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def not_for_helpers() -> Iterator[None]:
    """Processes that are started within do not see the signals that ask a run to end.

    torchrun and Slurm signal a whole group of processes, and a terminal does too: without this, workers that read
    images die before the step is finished and the checkpoint made. They inherit the mask of the thread that starts
    them, whatever starts them; signals to this process wait meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_main_process(_: int = 0) -> None:
    """In such a process: of these signals only SIGTERM from the process that it works for counts, which ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a server that was started before did not
    main = multiprocessing.parent_process()

    def wait() -> None:
        while main is not None and signal.sigwaitinfo([signal.SIGTERM]).si_pid != main.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="heed_main_process", daemon=True).start()


def preempted_status() -> int:
    """What a process that was asked to end leaves with: `PREEMPTED`.

    Where a launch script waits for it (LESAM_DIST_PREEMPTED, see docs/environment.md) it is told by a file, and the
    status is 0: torchrun takes any other for a failure, which it reports at length, or restarts.
    """
    file = os.environ.get("LESAM_DIST_PREEMPTED")
    if not file:
        return PREEMPTED
    with suppress(OSError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        return 0
    return PREEMPTED


def forget_preemption() -> None:
    """A run begins: the launch script's file, if there is one, is of processes that torchrun has replaced by now."""
    if file := os.environ.get("LESAM_DIST_PREEMPTED"):
        with suppress(OSError):
            os.unlink(file)
