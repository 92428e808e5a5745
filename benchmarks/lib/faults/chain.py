"""One run with faults in a row: start, be struck, resume, be struck again, ..., finish, be compared."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lib.faults import verdict
from lib.faults.damage import break_image, small_disk, unmount
from lib.faults.group import Server, Watch
from lib.faults.images import write_images
from lib.faults.inside import Start
from lib.faults.plan import Chain, Variant
from lib.faults.scenarios import Scenario
from lib.faults.strike import Strike, Struck, account
from lib.faults.verdict import End, WrongError

_AT_END = "at the end: "


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
            actions = (variant.spoilt,) if variant.spoilt else ()
            argv = scenario.argv(self._data(variant), folder / "run", variant.flags)
            start = Start(0, argv, folder, folder / "run", actions)
            outcome = self._server.run(start, scenario.world_size, Watch(limit=self._limit))
            if outcome.statuses != [0] * scenario.world_size:
                raise WrongError(f"the undisturbed run of {scenario.name} failed: {account(outcome)}")
            end = verdict.end_of(start.run_dir, start.consumed, variant.left_out)
            bad = variant.bad[0] if variant.bad else None
            if said := verdict.counted_wrongly(end.history, bad, variant.left_out):
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
        disk = folder / "disk"
        unmount(disk)  # what a campaign that was killed has left
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with ExitStack() as stack:
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
            return [Struck(chain.variant.kind, True, str(error), note=chain.variant.name)]
        always = (chain.variant.spoilt,) if chain.variant.spoilt else ()
        argv = chain.scenario.argv(self._data(chain.variant), run_dir, chain.variant.flags)
        found: list[Struck] = []
        processes, finished = chain.scenario.world_size, False
        for number, fault in enumerate(chain.faults):
            if finished:
                found.append(Struck(fault.kind, injected=False))
                continue
            start = Start(number, argv, folder, run_dir, (*always, *fault.actions))
            strike = Strike(self._server, fault, start, processes, self._limit)
            found.append(strike.run(seconds))
            finished = strike.finished
            processes = fault.resize or processes
            if found[-1].lost:
                return found
        if not finished:
            start = Start(len(chain.faults), argv, folder, run_dir, always)
            outcome = self._server.run(start, processes, Watch(limit=self._limit))
            if outcome.statuses != [0] * processes:
                return _blame(found, f"the resume failed: {account(outcome)}")
        if said := self._compare(chain, found, run_dir, folder / "consumed", expected):
            found = _blame(found, f"{_AT_END}{said}")
        if chain.variant != Variant():
            lost = next((s.lost for s in found if s.lost), None) if not chain.faults else None
            found.append(Struck(chain.variant.kind, True, lost, note=chain.variant.name))
        return found

    def _compare(self, chain: Chain, found: list[Struck], run_dir: Path, consumed: Path, expected: End) -> str | None:
        try:
            end = verdict.end_of(run_dir, consumed, chain.variant.left_out)
        except WrongError as error:
            return str(error)
        bad = chain.variant.bad[0] if chain.variant.bad else None
        said = verdict.counted_wrongly(end.history, bad, chain.variant.left_out)
        said += verdict.differences(end, expected, resized=any(fault.resize for fault in chain.faults))
        steps = verdict.first_steps(consumed)
        for number, fault in enumerate(chain.faults):
            # What was asked to end had the time to save: nothing is made twice.
            made, after = steps.get(number), steps.get(number + 1)
            if not (fault.asks and found[number].preempted and made and after):
                continue
            if (jump := chain.variant.left_out) is not None and made[0] <= jump < made[1]:
                continue  # it went back in that start, and was to make what follows the jump again
            if after[0] != made[1] + 1:
                said.append(f"{fault.kind} ended it after step {made[1] + 1}, and step {after[0]} was made again")
        return "; ".join(said) or None

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


def _blame(found: list[Struck], lost: str) -> list[Struck]:
    """The last fault that took place is to blame, until each has been tried alone."""
    last = max((i for i, s in enumerate(found) if s.injected), default=None)
    if last is None:
        return [*found, Struck("none", True, lost)]
    return [replace(s, lost=lost) if i == last else s for i, s in enumerate(found)]
