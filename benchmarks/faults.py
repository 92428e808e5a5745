"""Shows whether a run can be lost: faults at random points of small runs, each resumed to its end and compared.

    python benchmarks/faults.py --faults 300 --seed 1 [--kinds kill-save,full-disk] [--markdown FILE.md]

A chain is one run of 24 steps that is struck, resumed, struck again, ... and finished. It survives where the tensors
of its last checkpoint have the bits of the run that nothing disturbed (of the same data, where images are broken or
gradients are not numbers), where metrics.jsonl has the same lines, none twice and none torn, and where every image was
consumed exactly once per epoch. What a step consumed is read from its pixels. Where an end is wrong, each fault of the
chain is tried alone.

Stop it with Ctrl-C and start it again: it goes on from its journal. A lost fault is listed with the command that
repeats it. Everything lies in memory (/dev/shm) where there is such a folder. full-disk needs root and `mount`,
link-cut root and `ip`: elsewhere they are left out.
"""

from __future__ import annotations

import argparse
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from lib import ROOT
from lib.arguments import Parser
from lib.faults.campaign import Journal, run_chains, summary
from lib.faults.chain import Runs
from lib.faults.damage import can_mount
from lib.faults.group import Server
from lib.faults.network import can_link
from lib.faults.plan import KINDS, draw_chain
from lib.faults.scenarios import SCENARIOS
from lib.report import Report, commit, percentiles, progress


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    possible = {"full-disk": can_mount, "link-cut": can_link}
    kinds = [kind for kind in args.kinds if kind not in possible or possible[kind]()]
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in args.scenarios]
    with _folder(args.folder) as folder:
        runs = Runs(Server(), folder, args.limit)
        if args.chain is not None:
            return _one_chain(runs, args, kinds, scenarios)
        settings = {"seed": args.seed, "kinds": kinds, "scenarios": args.scenarios, "commit": commit()}
        journal = Journal(args.journal or ROOT / "runs" / f"faults-{args.seed}.jsonl", settings)
        try:
            journal.open()
        except ValueError as error:
            print(f"{error}. Choose another --journal, or remove it.", file=sys.stderr)
            return 2
        began = time.monotonic()
        try:
            run_chains(runs, journal, args.faults, args.seed, kinds, scenarios)
        except KeyboardInterrupt:  # SIGTERM too
            progress(f"interrupted: the same command goes on from {journal.path}")
        report = Report(args, "faults.py", torch.device("cpu"), "Faults")
        report.add(_account(journal, args, time.monotonic() - began))
    return 1 if any(s.lost for s in journal.faults) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--faults", type=int, default=300, metavar="N", help="how many to inject; default: 300")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**31), metavar="N", help="of all that is drawn; default: any"
    )
    parser.add_names("--kinds", KINDS, list(KINDS), "default: all")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_names("--scenarios", names, names, "default: all")
    parser.add_argument("--chain", type=int, metavar="N", help="run this chain alone, and print what becomes of it")
    parser.add_argument(
        "--only", type=int, metavar="I", help="and of its faults the one with this index, from 0, alone"
    )
    parser.add_argument(
        "--limit", type=float, default=90, metavar="S", help="seconds that one start may take; default: 90"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="keep lost runs and undisturbed ones there; default: keep none"
    )
    parser.add_argument("--journal", type=Path, metavar="FILE", help="default: runs/faults-SEED.jsonl")
    parser.add_files()
    return parser.parse(argv)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="faults-") as folder:
        yield Path(folder)


def _one_chain(runs: Runs, args: argparse.Namespace, kinds: list[str], scenarios: list) -> int:  # type: ignore[type-arg]
    chain = draw_chain(args.seed, args.chain, kinds, scenarios)
    chain = chain if args.only is None else chain.only(args.only)
    print(f"{chain.scenario.name}, {chain.variant.name}, {len(chain.faults)} faults")
    found = runs.run(chain)
    for struck in found:
        state = "lost" if struck.lost else "survived" if struck.injected else "not injected"
        print(f"{struck.kind}: {state} ({struck.note}; {struck.seconds:.1f} s) {struck.lost or ''}")
    return 1 if any(s.lost for s in found) else 0


def _account(journal: Journal, args: argparse.Namespace, seconds: float) -> str:
    """The table, and a line with a command for each fault that was not survived."""
    struck = journal.faults
    text = f"{len(struck)} faults in {len(journal.done)} runs, {seconds / 60:.1f} minutes here."
    if struck:
        starts = percentiles([s.seconds for s in struck])
        text += f" A start took {starts['p50']:.1f} s ({starts['p20']:.1f}-{starts['p80']:.1f})."
    text += f"\n\n{summary(struck)}\n"
    for number, found in sorted(journal.done.items()):
        for s in found:
            if s.lost:
                words = ["python", "benchmarks/faults.py", "--seed", str(args.seed), "--chain", str(number)]
                for flag in ("kinds", "scenarios"):
                    words += _given(args, flag)
                text += f"- lost: {s.kind} ({s.note}): {s.lost}\n\n      {shlex.join(words)}\n"
    return text


def _given(args: argparse.Namespace, flag: str) -> list[str]:
    """A flag as it was given, since a chain depends on it."""
    return [f"--{flag}", ",".join(getattr(args, flag))] if any(w.startswith(f"--{flag}") for w in args.argv) else []


if __name__ == "__main__":
    sys.exit(main())
