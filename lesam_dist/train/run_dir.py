"""The folder that a run writes to: claimed by one run at a time, and never another's."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lesam_dist.config.command_line import dump, parse
from lesam_dist.config.same_run import check_same_run, differences
from lesam_dist.config.schema import Config
from lesam_dist.config.values import flatten
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.telemetry import METRICS

CONFIG = "config.yaml"
_LOCK = ".lock"


@dataclass
class RunDir:
    """A folder that is this run's until `release`, or until the process ends in whatever way."""

    path: Path
    _lock: IO[str] | None = None  # on rank 0, where the file system has locks

    def release(self) -> None:
        """Let another run have it."""
        if self._lock is not None:
            self._lock.close()


def claim(config: Config, world: Distributed) -> RunDir:
    """Make the run's folder and write config.yaml, on rank 0. A file that is there stays as it is.

    Raises:
        UserError: another run is at it; it holds a run and nothing says to resume it; the resumed run's config or a
            config.yaml in it says something else; or it cannot be written.
    """
    run_dir = RunDir(Path(config.run_dir))
    if world.is_main:
        try:
            run_dir = _claim(config, world, run_dir.path)
        except OSError as error:
            raise UserError(f"run_dir '{run_dir.path}' cannot be written: {error.strerror or error}.") from error
    world.barrier()
    return run_dir


def _claim(config: Config, world: Distributed, path: Path) -> RunDir:
    checkpoints = Checkpointer(path / "checkpoints", world, config.checkpoint)
    if config.resume is None and ((path / METRICS).exists() or checkpoints.exist()):
        raise UserError(f"run_dir '{path}' already holds a run: go on with --resume auto, or choose another --run_dir.")
    path.mkdir(parents=True, exist_ok=True)
    run_dir = RunDir(path, _lock(path))
    saved = checkpoints.progress()
    if saved is not None:
        check_same_run(config, saved["config"])
    file, text = path / CONFIG, dump(config)
    if not file.exists():
        file.write_text(text, encoding="utf-8")
    elif file.read_bytes() != text.encode():
        _require_same(config, file)
    return run_dir


def _lock(path: Path) -> IO[str] | None:
    """A lock that the kernel takes back when this process ends, and that its children do not inherit."""
    file = (path / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            print(f"warning: {path} cannot be locked ({error.strerror}): do not start a second run in it", flush=True)
            return None
        file.seek(0)
        raise UserError(
            f"run_dir '{path}' is in use by another run ({file.read().strip() or 'unknown'}): wait for it, end it, or "
            "choose another --run_dir."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _require_same(config: Config, file: Path) -> None:
    """Refuse a config.yaml, of another run or written by hand, that does not say what this run does."""
    try:
        there = parse(["--config", str(file)])
    except (UserError, ValueError) as error:  # ValueError: not even text
        raise UserError(f"'{file}' is in the way: {error}. Choose another --run_dir.") from error
    if differing := differences(config, flatten(there), "there"):
        raise UserError(
            f"run_dir '{file.parent}' holds a {CONFIG} that says something else, and is not overwritten:\n  "
            + "\n  ".join(differing)
            + "\nUse its values, or choose another --run_dir."
        )
