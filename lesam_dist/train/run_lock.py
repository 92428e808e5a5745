"""The lock of a run's folder: one run at a time, on any file system, and who has it.

The kernel takes a lock back when its process ends in whatever way. Where the file system has no locks, a record that is
created exclusively stands for one: it is stale where its process is gone from this host, or, on another, where nobody
has touched it for some minutes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from lesam_dist.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_TOUCH = 60.0  # seconds between two signs of life
_STALE = 5 * _TOUCH  # seconds without one; more than a server is slow, and than clocks of two hosts differ


@dataclass(frozen=True)
class Holder:
    """Who has a run's folder: rank 0's process.

    Attributes:
        host: its name.
        pid: there.
        started: when, in clock ticks since the boot; pids are used again. 0 where the system does not say.
        boot: which boot of the host that was, and in which namespace the pid counts.
        run_id: of torchrun; "" without one.
        agent: the process that started it.
        since: when it claimed the folder, UTC, ISO 8601.
    """

    host: str
    pid: int
    started: int
    boot: list[str]
    run_id: str
    agent: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        host, parent = socket.gethostname(), os.getppid()
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none").removeprefix("none")
        agent = f"process {parent} on {host}, started at {_started(parent)} of boot {_boot()}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(host, os.getpid(), _started(os.getpid()), _boot(), run_id, agent, now)

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """Who wrote it; None where nobody did, or not to its end, or an older version.

        Never of a file that this process has locked: the kernel takes the lock back when any handle is closed.
        """
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        """Whether this host can say if that process lives."""
        return self.host == socket.gethostname() and (self.boot == _boot() or self.boot[:1] != _boot()[:1])

    @property
    def is_gone(self) -> bool:
        """Whether that process is known to have ended."""
        if not self.is_here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return self.boot != _boot() or self.started != _started(self.pid)

    @property
    def is_restarting(self) -> bool:
        """Whether this process is the same run, started again by the same torchrun.

        After a failure it counts the restart. When nodes come or go it does not, but where rank 0 was, it is the same
        process.
        """
        me = Holder.me()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return False  # a shell, which starts one run after the other
        counts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
        return self.agent == me.agent or (counts and bool(me.run_id) and self.run_id == me.run_id)


class Lock:
    """A folder that nobody else takes until `release`, or until this process ends.

    Args:
        file: in the folder, which exists; kept when the lock is gone, as it says whose run this is.
        say: takes a warning for the terminal.

    Raises:
        UserError: another process has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self._file = file
        self._held = file.with_name(file.name + ".held")  # where there are no locks
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._handle: IO[str] | None = file.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._handle.close()
            self._handle = None
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(file, Holder.read(file)) from error
            if error.errno not in _NO_LOCKS:
                raise
            self._claim_record(say)
        _write(file, Holder.me(), self._handle)

    def release(self) -> None:
        """Let another run have it."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._held.unlink(missing_ok=True)
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _claim_record(self, say: Callable[[str], None]) -> None:
        """Create the record; O_EXCL makes that one process's alone, also on NFS."""
        if not _create(self._held):
            self._take_over(say)
        self._thread = threading.Thread(target=self._touch, name="run_lock", daemon=True)
        self._thread.start()

    def _take_over(self, say: Callable[[str], None]) -> None:
        """Claim a stale record, or raise."""
        holder = Holder.read(self._held)
        try:
            age = _age(self._held)
        except FileNotFoundError:
            age = 0.0  # released this moment
        old = age > _STALE and (holder is None or not holder.is_here)  # None: it ended between creating and writing
        if not old and not (holder is not None and holder.is_gone):
            raise _in_use(self._held, holder)
        # Of several that find it stale, one gets to move it aside; a fresh one that came meanwhile is put back.
        aside = self._held.with_name(f"{self._held.name}.{socket.gethostname()}.{os.getpid()}")
        with suppress(FileNotFoundError):
            self._held.rename(aside)
            if Holder.read(aside) != holder:
                with suppress(FileExistsError):
                    os.link(aside, self._held)
                aside.unlink()
                raise _in_use(self._held, Holder.read(self._held))
            aside.unlink()
        if not _create(self._held):
            raise _in_use(self._held, Holder.read(self._held))
        say(f"{self._file.parent} was in use by {holder or 'an unknown process'}, which has gone: taking it over.")

    def _touch(self) -> None:
        while not self._over.wait(_TOUCH):
            with suppress(OSError):
                os.utime(self._held)


def _create(file: Path) -> bool:
    """Create it with this process in it; whether it was not there."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        json.dump(asdict(Holder.me()), handle)
    return True


def _write(file: Path, holder: Holder, handle: IO[str] | None) -> None:
    text = json.dumps(asdict(holder))
    if handle is None:
        file.write_text(text, encoding="utf-8")
        return
    handle.truncate(0)  # the lock is the file's: it cannot be written aside and renamed
    handle.write(text)
    handle.flush()


def _in_use(file: Path, holder: Holder | None) -> UserError:
    who = holder or "unknown"
    return UserError(
        f"run_dir '{file.parent}' is in use by another run ({who}): wait for it, end it, or choose another --run_dir."
    )


def _age(file: Path) -> float:
    """Seconds since the file was touched, by the file's own host's clock where that can be had."""
    probe = file.with_name(f"{file.name}.now.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none, or the system does not say."""
    with suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    return 0


def _boot() -> list[str]:
    """This boot of the host, and the namespace that pids count in; empty where the system does not say."""
    with suppress(OSError):
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return []
