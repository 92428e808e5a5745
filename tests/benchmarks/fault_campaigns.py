"""A small campaign with a fixed seed, one with a fresh seed, and a chain with a fault that no run survives.

In one process of its own, since the server that runs are forked from is one per process: `test_faults.py` calls it.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(1, str(ROOT / "benchmarks"))

import faults  # noqa: E402
from lib.faults.chain import Runs  # noqa: E402
from lib.faults.group import Server  # noqa: E402
from lib.faults.plan import Chain, Fault, Place, Variant  # noqa: E402
from lib.faults.points import Action, Point  # noqa: E402
from lib.faults.scenarios import SCENARIOS  # noqa: E402
from lib.faults.strike import Struck  # noqa: E402

# Cheap ones, that keep their state in different places: each needs an undisturbed run.
QUICK = "ddp-gsam,ddp-lesam-ema"
EIGHT = 138  # a seed whose first runs have eight kinds of faults: in passes, saves, an evaluation, files, the disk


def main(folder: Path, seed: int) -> None:
    for number, (of, count) in enumerate(((EIGHT, 8), (seed, 1))):
        options = ["--seed", str(of), "--faults", str(count), "--scenarios", QUICK, "--folder", str(folder)]
        faults.main([*options, "--journal", str(folder / f"journal-{number}.jsonl")])
    print(json.dumps([asdict(struck) for struck in planted(folder)]))


def planted(folder: Path) -> list[Struck]:
    """A batch that becomes NaN in one start alone, so that its step is skipped there and not in the reference."""

    def kill(place: Place, step: int) -> Action:
        return Action(Point(place, step), "signal", signal.SIGKILL, 1)

    lost = Fault("planted", (Action(Point("pass1", 7), "nan", 0.0, 0), kill("pass1", 13)))
    survived = Fault("kill", (kill("climbs", 20),))
    scenario = next(scenario for scenario in SCENARIOS if scenario.name in QUICK)
    return Runs(Server(), folder).run(Chain(0, scenario, Variant(), (lost, survived)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
