"""One run with faults in a row: start, be struck, resume, be struck again, ..., finish, be compared."""

from __future__ import annotations

import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lib.faults import verdict
from lib.faults.damage import break_image, damage_run, small_disk
from lib.faults.group import Event, Group, Outcome, Server, Watch
from lib.faults.images import write_images
from lib.faults.inside import Start
from lib.faults.plan import Chain, Fault, Variant
from lib.faults.scenarios import Scenario
from lib.faults.verdict import End, WrongError

_SECOND_JOB_LIMIT = 60.0
_OK = 0


@dataclass(frozen=True)
class Struck:
    """What became of one fault.

    Attributes:
        kind: its kind.
        injected: whether it took place at all; a run may end before.
        lost: why the run did not survive it; None where it did.
        seconds: of the start that it struck.
        note: where it struck.
    """

    kind: str
    injected: bool
    lost: str | None = None
    seconds: float = 0.0
    note: str = ""


class Runs:
    """Runs chains in a folder of their own.

    Args:
        server: where processes come from.
        folder: existing, on a fast disk.
        limit: seconds that a start may take.
    """

    def __init__(self, server: Server, folder: Path, limit: float = 90.0) -> None:
        self._server, self._folder, self._limit = server, folder, limit
        (folder / "references").mkdir(exist_ok=True)

    def reference(self, scenario: Scenario, variant: Variant) -> tuple[End, float]:
        """The end of the run that nothing disturbs, and the seconds that it took; made once.

        Raises:
            WrongError: it does not end, or did not consume every image once.
        """
        folder = self._folder / "references" / f"{scenario.name}-{variant.name}"
        if not (folder / "end.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            actions = (variant.nan,) if variant.nan else ()
            start = Start(0, scenario.argv(self._data(variant), folder / "run"), folder, folder / "run", actions)
            outcome = self._server.run(start, scenario.world_size, Watch(limit=self._limit))
            if outcome.statuses != [_OK] * scenario.world_size:
                raise WrongError(f"the undisturbed run of {scenario.name} failed: {_account(outcome)}")
            end = verdict.end_of(start.run_dir, start.consumed, scenario.world_size)
            if said := verdict.counted_wrongly(end.history, variant.bad[0] if variant.bad else None):
                raise WrongError(f"the undisturbed run of {scenario.name}: {said[0]}")
            (folder / "seconds").write_text(str(outcome.seconds))
            end.write(folder / "end.json")
            shutil.rmtree(start.run_dir)
        return End.read(folder / "end.json"), float((folder / "seconds").read_text())

    def run(self, chain: Chain) -> list[Struck]:
        """All faults of a chain. Where its end is wrong, each is tried alone to find the one to blame."""
        found = self._run(chain)
        wrong = next((s.lost for s in found if s.lost and s.lost.startswith(_AT_END)), None)
        injected = [i for i, s in enumerate(found) if s.injected and i < len(chain.faults)]
        if wrong is None or len(injected) < 2:
            return found
        alone = {i: self._run(chain.only(i))[0] for i in injected}
        if not any(s.lost for s in alone.values()):  # it takes several of them
            return found
        return [alone.get(i, s) for i, s in enumerate(found)]

    def _run(self, chain: Chain) -> list[Struck]:
        folder = self._folder / f"chain-{chain.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with ExitStack() as stack:
            disk = folder / "disk"
            if any(fault.small_disk for fault in chain.faults):
                stack.enter_context(small_disk(disk))
            disk.mkdir(exist_ok=True)
            found = self._in_folder(chain, folder, disk / "run")
        if not any(s.lost for s in found):
            shutil.rmtree(folder)
        return found

    def _in_folder(self, chain: Chain, folder: Path, run_dir: Path) -> list[Struck]:
        try:
            expected, seconds = self.reference(chain.scenario, chain.variant)
        except WrongError as error:
            return [Struck(_kind(chain.variant), True, str(error), note=chain.variant.name)]
        found: list[Struck] = []
        always = (chain.variant.nan,) if chain.variant.nan else ()
        argv = chain.scenario.argv(self._data(chain.variant), run_dir)
        finished = False
        for number, fault in enumerate(chain.faults):
            if finished:
                found.append(Struck(fault.kind, injected=False))
                continue
            start = Start(number, argv, folder, run_dir, (*always, *fault.actions))
            struck, outcome = self._strike(fault, start, chain.scenario, seconds)
            finished = outcome.statuses == [_OK] * chain.scenario.world_size
            found.append(struck)
            if struck.lost:
                return found
        if not finished:
            start = Start(len(chain.faults), argv, folder, run_dir, always)
            outcome = self._server.run(start, chain.scenario.world_size, Watch(limit=self._limit))
            if outcome.statuses != [_OK] * chain.scenario.world_size:
                return _blame(found, f"the resume failed: {_account(outcome)}")
        if said := self._compare(chain, run_dir, folder / "consumed", expected):
            found = _blame(found, f"{_AT_END}{said}")
        if chain.variant != Variant():
            lost = next((s.lost for s in found if s.lost), None)
            found.append(
                Struck(_kind(chain.variant), True, lost if not chain.faults else None, note=chain.variant.name)
            )
        return found

    def _compare(self, chain: Chain, run_dir: Path, consumed: Path, expected: End) -> str | None:
        try:
            end = verdict.end_of(run_dir, consumed, chain.scenario.world_size)
        except WrongError as error:
            return str(error)
        bad = chain.variant.bad[0] if chain.variant.bad else None
        return "; ".join(verdict.counted_wrongly(end.history, bad) + verdict.differences(end, expected)) or None

    def _strike(self, fault: Fault, start: Start, scenario: Scenario, seconds: float) -> tuple[Struck, Outcome]:
        """One start with its fault."""
        second: list[str] = []

        def on_event(event: Event, group: Group) -> None:
            if event["deed"] != "stop":
                return
            if fault.parent == "second-job":
                second.append(self._second_job(start, scenario))
                group.send(signal.SIGCONT)
            else:
                time.sleep(fault.value)
                ranks = [event["rank"]]
                group.send(signal.SIGKILL if fault.parent == "kill" else signal.SIGCONT, ranks)

        watch = Watch(fault.as_torchrun, self._limit, on_event if fault.parent in _NEEDS_PARENT else None)
        if fault.outside:
            part, number, ranks = fault.outside
            watch.signals.append((part * seconds, number, list(ranks)))
        outcome = self._server.run(start, scenario.world_size, watch)
        (start.run_dir.parent / "ballast").unlink(missing_ok=True)
        struck = [event for event in outcome.struck if event["deed"] != "nan"]
        injected = bool(struck) or (fault.outside is not None and outcome.seconds > fault.outside[0] * seconds)
        note = "; ".join(f"rank {e['rank']} {e['place']} step {e['step']}" for e in struck)
        if injected and fault.parent == "damage":
            file = damage_run(fault.kind, start.run_dir, int(fault.value))
            injected, note = file is not None, f"{note}; {file}"
        lost = outcome.complaint or next((text for text in second if text), None)
        return Struck(fault.kind, injected, lost, outcome.seconds, note), outcome

    def _second_job(self, first: Start, scenario: Scenario) -> str:
        """Start another job in the same folder while the first is there; what is wrong with how that ended."""
        folder = first.folder / f"second-{first.number}"
        folder.mkdir()
        start = Start(first.number, first.argv, folder, first.run_dir)
        outcome = self._server.run(start, scenario.world_size, Watch(limit=_SECOND_JOB_LIMIT))
        refused = outcome.statuses == [2] * scenario.world_size and "in use by another run" in "".join(outcome.outputs)
        return "" if refused else f"a second job was not refused: {_account(outcome)}"

    def _data(self, variant: Variant) -> Path:
        name = variant.name if variant.bad else "plain"
        root = self._folder / f"data-{name}"
        if not root.exists():
            aside = root.with_name(f".{root.name}")
            shutil.rmtree(aside, ignore_errors=True)
            write_images(aside)
            if variant.bad:
                number, how = variant.bad
                break_image(next(aside.glob(f"train/*/{number:04d}.png")), how)
            aside.rename(root)
        return root


_AT_END = "at the end: "
_NEEDS_PARENT = ("continue", "kill", "second-job")


def _kind(variant: Variant) -> str:
    return "bad-image" if variant.bad else "nan" if variant.nan else "none"


def _blame(found: list[Struck], lost: str) -> list[Struck]:
    """The last fault that took place is to blame, until each has been tried alone."""
    last = max((i for i, s in enumerate(found) if s.injected), default=None)
    if last is None:
        return [*found, Struck("none", True, lost)]
    return [Struck(s.kind, s.injected, lost, s.seconds, s.note) if i == last else s for i, s in enumerate(found)]


def _account(outcome: Outcome) -> str:
    """Statuses, and the end of what the first rank with something to say said."""
    said = [line for text in outcome.outputs for line in text.splitlines() if "error" in line.lower()]
    last = [text.strip().splitlines()[-1] for text in outcome.outputs if text.strip()]
    return f"statuses {outcome.statuses}; {outcome.complaint or ''} {' / '.join((said or last)[:2])}"[:600]
