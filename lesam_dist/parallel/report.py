"""How the processes of a run report what went wrong: each failure once, however many processes share it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.place import Place

_SHOWN = 4  # names in one message
_RUN_AGO = 120.0  # seconds after which what was said belongs to an earlier run


def name_of(rank: int, host: str, several_hosts: bool) -> str:
    """What a message calls a process."""
    return f"rank {rank} on {host}" if several_hosts else f"rank {rank}"


def some_of(texts: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def report_failure(place: Place, error: BaseException) -> None:
    """Print a failure to stderr, behind the rank where that is not 0, unless another process of this node has done so.

    A `UserError` is one line, anything else a traceback.
    """
    text = message = " ".join(str(error).splitlines())  # a path may have line breaks
    if not isinstance(error, UserError):
        text, message = "".join(traceback.format_exception(error)).rstrip(), f"{type(error).__name__}: {error}"
    if place.rank and not isinstance(error, SharedError):
        several_hosts = place.world_size > place.local_world_size
        text = f"{name_of(place.rank, socket.gethostname(), several_hosts)}: {text}"
    _print_once(place, message, f"lesam-dist: error: {text}")


def report_once(place: Place, text: str) -> None:
    """Print a line to stderr, unless another process of this node has done so."""
    _print_once(place, f"lesam-dist: {text}", f"lesam-dist: {text}")


def report_remedy(place: Place, error: BaseException) -> None:
    """Print what an error says as its ``go_on``, if it has one: how to go on with the run that it has ended."""
    if text := getattr(error, "go_on", ""):
        report_once(place, text)


def report_stop(place: Place, text: str, error: BaseException) -> None:
    """Print why all processes stop, which is no failure, and behind it how to go on: rank 0 does, the last to leave.

    Another one, where it has lost rank 0 by then, says how to go on unless that has been said.
    """
    if place.rank == 0:
        remedy = getattr(error, "go_on", "")
        _print_once(place, f"lesam-dist: {remedy}", f"lesam-dist: {text}" + f"\nlesam-dist: {remedy}" * bool(remedy))
    elif error.__cause__ is not None:
        report_remedy(place, error)


def _print_once(place: Place, what: str, text: str) -> None:
    """Print to stderr, unless another child of this process's launcher has said the same: they keep a list in a file.

    It works before a process group is joined, and when joining it fails. Who does not print comes back when the other
    one has: what it prints next stands behind that.
    """
    with _turn_of(place, what) as is_first:
        if is_first:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _turn_of(place: Place, message: str) -> Iterator[bool]:
    """Whether nobody had this to say before; within, nobody else has the turn."""
    if place.world_size == 1:
        yield True
        return
    what = f"{place.address} {message}".encode(errors="surrogateescape")  # two runs at one time have two addresses
    digest = hashlib.blake2b(what, digest_size=16).hexdigest()
    with ExitStack() as stack:
        try:
            folder = _folder()
            folder.mkdir(mode=0o700, exist_ok=True)
            # Not buffered: a disk that is full shows when it is written, and not when it is closed.
            file = stack.enter_context(open(folder / f"failure-{digest}", "a+b", buffering=0))
            is_first = _add_to(file, place.rank)
        except OSError:
            is_first = True  # rather twice than never
        yield is_first


def _add_to(file: FileIO, rank: int) -> bool:
    """Lock the list until the file is closed, and write this process down; whether it is the first."""
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    ranks = file.read().decode().split()
    age = time.time() - os.fstat(file.fileno()).st_mtime
    if str(rank) in ranks or age > _RUN_AGO:  # the same launcher, a shell perhaps, started them again
        file.truncate(0)
        ranks = []
    file.write(f"{rank} ".encode())
    return not ranks


def _folder() -> Path:
    """A folder that the processes of one start on one node share: torchrun's for this start, or one of our own."""
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        own = Path(error_file).parent.parent
        if own.is_dir():
            return own
    parent, started = os.getppid(), "0"
    with suppress(OSError, IndexError):  # process ids are used again, with another start
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return Path(tempfile.gettempdir()) / f"lesam-dist-{os.getuid()}-{parent}-{started}"


@contextmanager
def ends_with_any_thread(place: Place) -> Iterator[None]:
    """Within, an exception that ends a thread is reported and ends the process, as it would in the main thread.

    What waits for the thread might otherwise wait for ever.
    """

    def fail(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or is_kept(args):  # None: the interpreter is shutting down
            return
        report_failure(place, args.exc_value)
        sys.stdout.flush()
        os._exit(2 if isinstance(args.exc_value, UserError) else 1)

    before, threading.excepthook = threading.excepthook, fail
    try:
        yield
    finally:
        threading.excepthook = before


def is_kept(args: threading.ExceptHookArgs) -> bool:
    """Whether the thread that failed keeps its exception for who uses it, and so nobody waits for it in vain.

    As the one that writes TensorBoard's events does: on a full disk the next event raises what it kept.
    """
    return args.thread is not None and getattr(args.thread, "exception", None) is args.exc_value


def end_with_launcher() -> None:
    """End this process soon after the one that started it has gone, which a killed launcher cannot do itself."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        with suppress(OSError):
            print(f"lesam-dist: the launcher (process {launcher}) is gone: stopping.", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait in a collective, which no signal handler would end

    threading.Thread(target=watch, name="end_with_launcher", daemon=True).start()
