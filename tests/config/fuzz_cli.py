"""Random command lines and YAML files: each must end with status 0, or with status 2 and one line.

    PYTHONPATH=. python tests/config/fuzz_cli.py --cases 5000 --dry_runs 200 --plans 50 --seed 7

Everything runs in this process. A case is parsed and checked as a run is before it reads data; a dry run then trains
two steps of a tiny network, and a plan predicts one. `pack` and `index` work on folders of a few tiny images. As a
script, a case that takes 20 seconds is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lesam_dist.cli import main
from lesam_dist.config.schema import Config
from lesam_dist.data.packed import packing
from lesam_dist.experiments import compare, sweep
from lesam_dist.planning import calibrate, command
from lesam_dist.planning import input as planned_input
from lesam_dist.planning.hardware import device_of
from lesam_dist.train import build
from lesam_dist.train import run as training
from tests.config.fuzz_cases import Case, make_case, make_folders, make_plan

_SECONDS = 20


class StoppedError(Exception):
    """Instead of runs that nobody needs."""


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """How a case ends: "0", "2" and of data that is damaged "1" are right, anything else is a fault; and what was
    printed to stderr."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    with _without_training(case), mock.patch.object(sys, "argv", ["lesam-dist", *case.argv]):
        before = Path.cwd()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as stopped:
            code = str(stopped.code)
        except StoppedError:
            code = "0"
        except BaseException:
            return "raised", traceback.format_exc()
        finally:
            os.chdir(before)
    text = err.getvalue()
    if code == "1" and case.argv[0] in ("pack", "index") and "--verify" in case.argv and not text:
        return "0", text  # it has found something, as it should
    if code == "2" and not (text.startswith("lesam-dist: error: ") and text.count("\n") == 1):
        return "2, not one line", text
    return code, text


@contextlib.contextmanager
def _without_training(case: Case) -> Iterator[None]:
    def checked(config: Config, *_: Any) -> None:
        build.check_optimizer(config.optimizer, torch.device("cpu"))

    def stop(*_: Any) -> None:
        raise StoppedError

    write_all = packing._write_all

    def in_this_process(tasks: Any, _: int) -> Any:
        return write_all(tasks, 1)

    with contextlib.ExitStack() as stack:
        if not case.runs:
            stack.enter_context(mock.patch.object(training, "train", checked))
            stack.enter_context(mock.patch.object(command, "predict_and_report", stop))
        stack.enter_context(mock.patch.object(calibrate, "calibrate", return_value=device_of("cpu")))
        stack.enter_context(mock.patch.object(planned_input, "measure_decode_rate", return_value=100.0))
        stack.enter_context(mock.patch.object(packing, "_write_all", in_this_process))
        for module in (compare, sweep):
            stack.enter_context(mock.patch.object(module, "run_all", stop))
        yield


def fuzz(cases: int, dry_runs: int, plans: int, seed: int, guard: Callable[[], Any] = lambda: None) -> Counter[str]:
    """Run that many cases; stops at none. Returns how often each outcome came, and prints the faults.

    Args:
        cases: that are parsed and checked.
        dry_runs: that train too.
        plans: that predict too.
        seed: of everything.
        guard: called before each case.
    """
    rng, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        make_folders(Path(name), rng)
        for index in range(cases + dry_runs + plans):
            planned = index >= cases + dry_runs
            case = make_plan(rng, runs=True) if planned else make_case(rng, runs=index >= cases)
            guard()
            code, text = outcome(case, Path(name))
            counts[code] += 1
            if code not in ("0", "2"):
                print(f"case {index} of seed {seed}: {code}\n  {case.argv!r}\n  {case.files!r}\n{text}", flush=True)
    return counts


def _script() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the command line.")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--dry_runs", type=int, default=100)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def timeout(*_: Any) -> None:
        raise TimeoutError(f"more than {_SECONDS} s")

    signal.signal(signal.SIGALRM, timeout)
    counts = fuzz(
        arguments.cases, arguments.dry_runs, arguments.plans, arguments.seed, guard=lambda: signal.alarm(_SECONDS)
    )
    signal.alarm(0)
    print(", ".join(f"{count} x {code}" for code, count in counts.most_common()))
    return int(bool(counts.keys() - {"0", "2"}))


if __name__ == "__main__":
    sys.exit(_script())
