"""`lesam-dist analyze NAME CHECKPOINT`: what all analyses have in common, from the arguments to the files."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lesam_dist.errors import UserError, unknown_name

if TYPE_CHECKING:
    from lesam_dist.analysis.output import Document, Output
    from lesam_dist.analysis.subject import Subject

ANALYSES = {
    "hessian": "largest eigenvalues, trace and spectral density of the loss's Hessian",
    "sharpness": "rise of the loss near the weights: worst case, average, per size of batch, and radius of a budget",
    "lpf": "low-pass filtered loss: its mean under Gaussian noise on the weights",
}
"""What there is, each with its one line; `lesam_dist.analysis.commands.NAME` has its `Analysis`."""

_SPLITS = ("train", "val")
_EPILOG = """example:
  lesam-dist analyze {name} runs/digits

on several GPUs:
  torchrun --nproc-per-node 8 -m lesam_dist analyze {name} runs/digits

Other flags are those of `lesam-dist train`, over the run's own config: --data.root DIR, --data.eval_batch_size N,
--parallel.device cpu. The same command again goes on where it was interrupted."""


def analyze(argv: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: for anything wrong in ``argv``, a checkpoint, or the images.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: lesam-dist analyze NAME ...\n\nanalyses of a checkpoint (lesam-dist analyze NAME --help):")
        for name, text in ANALYSES.items():
            print(f"  {name:12s}{text}")
        sys.exit(0 if argv else 2)
    name = argv[0]
    if name not in ANALYSES:
        raise unknown_name("analysis", name, ANALYSES)
    analysis: Analysis = import_module(f"lesam_dist.analysis.commands.{name}").ANALYSIS
    run(analysis, argv[1:])


@dataclass(frozen=True)
class Analysis:
    """One analysis of a checkpoint.

    Attributes:
        name: of the command.
        text: what it does, for --help.
        add_arguments: its own, beside those that all have.
        settings: of its arguments, what the results depend on.
        passes: how many forwards and backwards over the images it will take, and what for: (forwards, backwards, text).
        compute: its results, for JSON; with a `Work` that keeps what is done and moves the bar. On all ranks.
        draw: a matplotlib figure of a document.
        rows: of a document, what the terminal shows: name and value.
    """

    name: str
    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    settings: Callable[[argparse.Namespace], dict[str, Any]]
    passes: Callable[[argparse.Namespace, Subject], tuple[int, int, str]]
    compute: Callable[[argparse.Namespace, Subject, Work], dict[str, Any]]
    draw: Callable[[Document], Any]
    rows: Callable[[Document], list[tuple[str, str]]]


class Work:
    """What an analysis has done so far: kept in a journal, and shown.

    Attributes:
        journal: where parts that take long are kept.
        advance: tell that so many units are done.
    """

    def __init__(self, output: Output, advance: Callable[[int], None]) -> None:
        self.journal, self.advance = output.journal(), advance


class Parser(argparse.ArgumentParser):
    """An analysis's arguments; what is wrong with them is a `UserError`."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(
            prog=f"lesam-dist analyze {name}",
            description=textwrap.fill(text, 100),
            epilog=_EPILOG.format(name=name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "checkpoint",
            type=Path,
            help="folder of a checkpoint; of a run, for its latest one; or a file of a state_dict, with --config",
        )
        self.add_argument("--config", help="recipe or YAML file that a file of weights is of")
        self.add_argument("--ema", action="store_true", help="the averaged weights, of a run with ema.decay")
        self.add_argument("--split", choices=_SPLITS, default="train", help="whose images (default: train)")
        self.add_argument("--samples", type=_samples, default=1024, help="number of images, or all (default: 1024)")
        self.add_argument("--seed", type=int, default=0, help="of the choice of images and of directions (default: 0)")
        self.add_argument("--output", type=Path, help="folder for the results (default: RUN_DIR/analysis)")
        self.add_argument("--force", action="store_true", help="replace results that were made with other settings")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")


def run(analysis: Analysis, argv: Sequence[str]) -> None:
    """Make an analysis, unless it has been made, and show what it found."""
    parser = Parser(analysis.name, analysis.text)
    analysis.add_arguments(parser)
    arguments, flags = parser.parse_known_args(list(argv))
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}: it must be at least 0.")
    own = analysis.settings(arguments)  # refuses what is out of range, before anything is read

    from lesam_dist.analysis.output import Output  # here: --help and what is refused need no torch
    from lesam_dist.analysis.subject import load, read_source
    from lesam_dist.parallel.processes import process_group

    source = read_source(arguments.checkpoint, arguments.config, flags, averaged=arguments.ema)
    parallel = source.config.parallel
    with process_group(parallel.device, parallel.timeout_s) as world:
        subject = load(source, world, samples=arguments.samples, split=arguments.split, seed=arguments.seed)
        images = {"samples": subject.samples, "split": arguments.split, "seed": arguments.seed}
        facts = {"images": subject.images, "weights": source.digest}
        folder = arguments.output or source.folder / "analysis"
        stem = f"{analysis.name}-{source.name}"
        output = Output(folder, stem, {**own, **images, **facts}, world, force=arguments.force)
        document = output.finished()
        if world.is_main and document is not None:
            print(f"{output.path('json')}: finished before")
        if document is None:
            document = _compute(analysis, arguments, subject, output)
        if world.is_main:
            output.draw(analysis.draw(document))
            _show(analysis, document, output)


def _compute(analysis: Analysis, arguments: argparse.Namespace, subject: Subject, output: Output) -> Document:
    forwards, backwards, what = analysis.passes(arguments, subject)
    world = subject.world
    if world.is_main:
        several = f" on {world.world_size} processes" if world.world_size > 1 else ""
        print(
            f"{what}: about {forwards} forward and {backwards} backward passes over {subject.samples} images{several}",
            flush=True,
        )
    begin = time.monotonic()
    with _bar(analysis.name, forwards + backwards, shown=world.is_main) as advance:
        work = Work(output, advance)
        results = analysis.compute(arguments, subject, work)
    about = {"analysis": analysis.name, "checkpoint": subject.source.name, "run": subject.source.folder.name}
    about |= subject.source.about | {"seconds": round(time.monotonic() - begin, 1)}
    document = output.write(results, about)
    work.journal.remove()
    return document


def _show(analysis: Analysis, document: Document, output: Output) -> None:
    from lesam_dist.experiments.report import show

    show((analysis.name, document["checkpoint"]), analysis.rows(document))
    print(f"results: {output.path('json')}  (.png, .svg)")


@contextmanager
def _bar(text: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and nothing elsewhere; call what is yielded with the passes made so far."""
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)


def _samples(text: str) -> int | None:
    """A number of images, at least 1; None for "all"."""
    if text == "all":
        return None
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_samples.__name__ = "number of images, which is at least 1 or all,"  # in argparse's message
