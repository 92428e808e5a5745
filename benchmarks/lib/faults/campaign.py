"""Many chains, and the journal from which a campaign goes on where it was left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.faults.chain import Runs
from lib.faults.plan import Chain, draw_chain
from lib.faults.strike import Struck
from lib.report import table


@dataclass
class Journal:
    """A line for each chain that was run, appended when it ends.

    Attributes:
        path: JSON Lines; the first one has the campaign's settings.
        settings: what makes two campaigns comparable: seed, kinds, scenarios, commit.
    """

    path: Path
    settings: dict[str, Any]
    done: dict[int, list[Struck]] = field(default_factory=dict)

    def open(self) -> None:
        """Read what is there.

        Raises:
            ValueError: it is of another campaign; the message says what differs.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self.settings)
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # the last line may be one that was being written when it was killed
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        lines = [json.loads(line) for line in whole.splitlines()]
        there = lines[0] if lines else {}
        differing = [key for key in self.settings if there.get(key) != self.settings[key]]
        if differing:
            raise ValueError(
                f"{self.path} is of another campaign: "
                + ", ".join(f"{key} {there.get(key)} there, {self.settings[key]} now" for key in differing)
            )
        self.done = {line["chain"]: [Struck(**s) for s in line["faults"]] for line in lines[1:]}

    def add(self, chain: Chain, faults: list[Struck]) -> None:
        """One more chain is done."""
        self.done[chain.number] = faults
        line = {"chain": chain.number, "scenario": chain.scenario.name, "faults": [asdict(s) for s in faults]}
        self._append(line)

    @property
    def faults(self) -> list[Struck]:
        """All that were injected."""
        return [s for struck in self.done.values() for s in struck if s.injected]

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run_chains(
    runs: Runs, journal: Journal, faults: int, seed: int, kinds: Sequence[str], scenarios: Sequence[Any]
) -> None:
    """Chains in the order of their numbers, without those of the journal, until so many faults were injected."""
    number = 0
    while len(journal.faults) < faults:
        if number not in journal.done:
            chain = draw_chain(seed, number, kinds, scenarios)
            if chain.faults or chain.variant.name != "plain":
                journal.add(chain, runs.run(chain))
        number += 1


def summary(struck: Sequence[Struck]) -> str:
    """A Markdown table: faults injected, survived and lost, by kind."""
    rows = []
    kinds = sorted({s.kind for s in struck})
    for kind in [*kinds, "all"]:
        mine = [s for s in struck if kind in (s.kind, "all")]
        lost = sum(s.lost is not None for s in mine)
        rows.append([kind, str(len(mine)), str(len(mine) - lost), str(lost)])
    return table(["fault", "injected", "survived", "lost"], rows)
