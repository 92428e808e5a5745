"""Processes for the commands that read whole data sets: started from a server, and deaf to Ctrl-C while they start."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext


def fork_server(module: str) -> BaseContext:
    """Whose processes have imported ``module``, once for all; where there is no fork server, each starts anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    if threading.current_thread() is threading.main_thread():  # else no handler can be set
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server has it from here: Ctrl-C is the parent's
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C waits for the end of this: who leaves processes while they start leaves them to tracebacks."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set, and none is called
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
