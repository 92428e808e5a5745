"""`lesam-dist report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lesam_dist.config.parser import Parser, examples
from lesam_dist.parallel.place import find_place
from lesam_dist.report.paths import NAME, check_packages, find_runs, target_of

_TEXT = (
    "One HTML file about training runs: what was run, curves with mean and deviation over seeds, what the radius did, "
    "the analyses in their folders, cost, speed and environment. It opens in any browser without a network, on a phone "
    "too, and can be printed. Runs that differ in the seed alone are one group."
)
_EXAMPLES = examples(
    "report runs/digits", "report runs/sgd runs/sam runs/lesam --output methods.html", "report runs/compare"
)


def report(argv: Sequence[str]) -> None:
    """The command; prints the path of the file.

    Raises:
        UserError: for anything wrong in ``argv`` or in a run, before anything is written.
    """
    parser = Parser("report", _TEXT, _EXAMPLES)
    parser.add_argument(
        "runs",
        metavar="run",
        nargs="+",
        type=Path,
        help="folder of a run; of a comparison or a sweep, for all of its runs",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the HTML file (default: RUN/{NAME} of one folder, else ./{NAME})"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    arguments = parser.parse_args(list(argv))
    check_packages()
    if find_place(os.environ).rank:  # it reads files, which several processes do no faster
        return

    find_runs(arguments.runs)
    target_of(arguments.runs, arguments.output, force=arguments.force)

    from lesam_dist.report.page import write_report  # here: --help and what is refused need no torch

    print(write_report(arguments.runs, arguments.output, force=arguments.force))
