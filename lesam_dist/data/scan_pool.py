"""Processes for `lesam-dist scan` that may die of a file without the scan dying of it."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from lesam_dist.data.fork_server import fork_server, interrupted_afterwards
from lesam_dist.data.scan_file import Verdict, work
from lesam_dist.errors import UserError

Work = Callable[[Connection], None]

_AHEAD = 4  # files that a process has at one time, so that it need not wait for the parent


class _Worker:
    def __init__(self, context: Any, target: Work) -> None:
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed here
        self.is_ready = False
        self.files: deque[str] = deque()  # that it has, the first of them at work

    def give(self, path: str) -> None:
        self.files.append(path)
        with suppress(OSError):  # it is dead, which is noticed when it is listened to
            self.pipe.send(path)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def examine_all(paths: Iterable[str], workers: int, target: Work = work) -> Iterator[tuple[str, Verdict]]:
    """Each file's verdict, in no order. A file that a process dies of is tried once more, alone, and then broken.

    Args:
        paths: of the files.
        workers: processes.
        target: what a process runs: a module's own function that does as `work`.

    Raises:
        UserError: a process dies before it has read any file.
    """
    context = fork_server(work.__module__)
    todo, again = iter(paths), deque[str]()
    suspects: set[str] = set()
    team: list[_Worker] = []

    def fill(worker: _Worker) -> None:
        while worker.is_ready and len(worker.files) < _AHEAD and not suspects.intersection(worker.files):
            path = again[0] if again else next(todo, None)
            if path is None:
                return
            if path in suspects and worker.files:
                return  # it waits until this one has nothing else to lose
            if again:
                again.popleft()
            worker.give(path)

    try:
        with interrupted_afterwards():
            team += (_Worker(context, target) for _ in range(workers))
        while True:
            for worker in team:
                fill(worker)
            busy = {worker.pipe: worker for worker in team if worker.files or not worker.is_ready}
            if not any(worker.files for worker in team) and all(worker.is_ready for worker in team):
                return
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    verdict = worker.pipe.recv()
                except (EOFError, OSError):
                    team[team.index(worker)] = _Worker(context, target)
                    if broken := _mourn(worker, suspects, again):
                        yield broken
                    continue
                if not worker.is_ready:
                    worker.is_ready = True
                else:
                    yield worker.files.popleft(), verdict
    finally:
        for worker in team:
            worker.end()


def _mourn(worker: _Worker, suspects: set[str], again: deque[str]) -> tuple[str, Verdict] | None:
    """What a process that died leaves to others, and its first file if it was the second to die of it."""
    worker.process.join()
    status = worker.process.exitcode or 0
    worker.pipe.close()
    if not worker.files:
        raise UserError(f"a process of the scan ended with status {status} before it read a file: use fewer --workers.")
    path = worker.files.popleft()
    again.extendleft(reversed(worker.files))
    if path not in suspects:
        suspects.add(path)
        again.append(path)
        return None
    suspects.remove(path)
    by = signal.Signals(-status).name if status < 0 else f"status {status}"
    return path, Verdict(None, 0, f"the decoder crashed ({by})", "")
