"""One start of a run with one fault: what the parent does to it, and how it must end."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass

from lib.faults.damage import damage_run, remount
from lib.faults.group import Event, Group, Outcome, Server, Watch
from lib.faults.inside import Start
from lib.faults.network import Link, link
from lib.faults.plan import Fault

_PREEMPTED, _REFUSED = 75, 2  # statuses of lesam-dist
_SHORT_TIMEOUT = ["--parallel.timeout_s", "6"]  # where the network is gone nothing but a timeout tells


@dataclass(frozen=True)
class Struck:
    """What became of one fault.

    Attributes:
        kind: its kind.
        injected: whether it took place at all; a run may end before.
        lost: why the run did not survive it; None where it did.
        seconds: of the start that it struck.
        note: where it struck.
        preempted: the start ended as one that was asked to, having saved.
    """

    kind: str
    injected: bool
    lost: str | None = None
    seconds: float = 0.0
    note: str = ""
    preempted: bool = False


class Strike:
    """A start that is to be struck.

    Attributes:
        finished: whether the run came to its end, in spite of the fault or because it came too late.
    """

    def __init__(self, server: Server, fault: Fault, start: Start, processes: int, limit: float) -> None:
        self._server, self._fault, self._start, self._processes, self._limit = server, fault, start, processes, limit
        self._link: Link | None = None
        self._complaint: str | None = None
        self.finished = False

    def run(self, seconds: float) -> Struck:
        """Start and strike; ``seconds`` is what an undisturbed run takes."""
        fault, start = self._fault, self._start
        disk = start.run_dir.parent
        watch = Watch(fault.as_torchrun, self._limit, self._on_event if fault.parent else None)
        at = fault.outside[0] * seconds if fault.outside else None
        if fault.outside and at is not None:
            watch.signals.append((at, fault.outside[1], list(fault.outside[2])))
        with ExitStack() as stack:
            if fault.parent == "cut":
                self._link = stack.enter_context(link())
                start = Start(start.number, [*start.argv, *_SHORT_TIMEOUT], start.folder, start.run_dir, start.actions)
            if fault.parent == "remount":
                remount(disk, writable=False)
                stack.callback(remount, disk, writable=True)
            outcome = self._server.run(start, self._processes, watch, self._link)
        (disk / "ballast").unlink(missing_ok=True)
        self.finished = outcome.statuses == [0] * self._processes
        struck = [event for event in outcome.struck if event["deed"] not in ("nan", "jump")]
        injected = bool(struck) or fault.parent == "remount" or (at is not None and outcome.seconds > at)
        note = "; ".join(f"rank {e['rank']} {e['place']} step {e['step']}" for e in struck)
        if injected and fault.parent == "damage":
            file = damage_run(fault.kind, start.run_dir, int(fault.value))
            injected, note = file is not None, f"{note}; {file}"
        lost = outcome.complaint or self._complaint or self._wrong_end(outcome)
        return Struck(fault.kind, injected, lost, outcome.seconds, note, _PREEMPTED in outcome.statuses)

    def _wrong_end(self, outcome: Outcome) -> str | None:
        """What is wrong with how the start ended, where more is known of it than that it may."""
        statuses = set(outcome.statuses)
        if self._fault.parent == "remount" and not _refused(outcome):
            return f"a disk that cannot be written was not refused: {account(outcome)}"
        if self._fault.parent in ("continue", "second-job") and statuses != {0}:
            return f"a process that only stood still for a while ended the run: {account(outcome)}"
        trains = any(event["step"] > 0 and event["place"] != "loaded" for event in outcome.struck)
        # Who comes last may be sent SIGTERM by the launcher when it has nothing left to do.
        leaves = statuses == {0} or (_PREEMPTED in statuses and statuses <= {_PREEMPTED, -signal.SIGTERM})
        if self._fault.asks and trains and not leaves:
            return f"asked to end, it did not save and leave with status {_PREEMPTED}: {account(outcome)}"
        if "Traceback" in "".join(outcome.outputs):
            return f"a traceback: {account(outcome)}"
        return None

    def _on_event(self, event: Event, group: Group) -> None:
        if event["deed"] == "cut" and self._link is not None:
            self._link.cut()
        if event["deed"] != "stop":
            return
        if self._fault.parent == "second-job":
            self._complaint = self._second_job()
            group.send(signal.SIGCONT)
        else:
            time.sleep(self._fault.value)
            group.send(signal.SIGKILL if self._fault.parent == "kill" else signal.SIGCONT, [event["rank"]])

    def _second_job(self) -> str | None:
        """Start another job in the same folder while the first is there; what is wrong with how that ended."""
        folder = self._start.folder / f"second-{self._start.number}"
        folder.mkdir()
        start = Start(self._start.number, self._start.argv, folder, self._start.run_dir)
        outcome = self._server.run(start, self._processes, Watch(limit=self._limit))
        says_why = "in use by another run" in "".join(outcome.outputs)
        return None if _refused(outcome) and says_why else f"a second job was not refused: {account(outcome)}"


def _refused(outcome: Outcome) -> bool:
    """With status 2, by at least one process; the launcher may have ended the others."""
    return _REFUSED in outcome.statuses and set(outcome.statuses) <= {_REFUSED, -signal.SIGTERM}


def account(outcome: Outcome) -> str:
    """Statuses, and the end of what the first ranks with something to say said."""
    said = [line for text in outcome.outputs for line in text.splitlines() if "error" in line.lower()]
    last = [text.strip().splitlines()[-1] for text in outcome.outputs if text.strip()]
    return f"statuses {outcome.statuses}; {outcome.complaint or ''} {' / '.join((said or last)[:2])}"[:600]
