"""`lesam-dist analyze NAME CHECKPOINT ...`: what all analyses have in common, from the arguments to the files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lesam_dist.analysis.engine.arguments import AnalysisParser
from lesam_dist.errors import unknown_name

if TYPE_CHECKING:
    from lesam_dist.analysis.engine.output import Document, Output
    from lesam_dist.analysis.engine.subject import Subject

Of = TypeVar("Of")

ANALYSES = {
    "hessian": "largest eigenvalues, trace and spectral density of the loss's Hessian",
    "sharpness": "rise of the loss near the weights: worst case, average, per size of batch, and radius of a budget",
    "lpf": "low-pass filtered loss: its mean under Gaussian noise on the weights",
    "landscape": "the loss on a line or a plane through the weights, along filter-normalised directions",
    "connect": "the loss on the straight line between two checkpoints, and its barrier",
    "robustness": "accuracy under attacks on the pixels (PGD) and common corruptions, and calibration",
    "radius": "what the radius did in a run, and what the loss made of it, from its log",
}
"""What there is, each with its one line; `lesam_dist.analysis.commands.NAME` has its `Analysis` or `Comparison`."""


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
    module = import_module(f"lesam_dist.analysis.commands.{name}")
    if hasattr(module, "command"):  # of a run's log, without a checkpoint
        module.command(argv[1:])
    else:
        run(module.ANALYSIS, argv[1:])


@dataclass(frozen=True)
class _Parts(Generic[Of]):
    name: str
    text: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    settings: Callable[[argparse.Namespace], dict[str, Any]]
    passes: Callable[[argparse.Namespace, Of], tuple[int, int, str]]
    compute: Callable[[argparse.Namespace, Of, Work], dict[str, Any]]
    draw: Callable[[Document], Any]
    rows: Callable[[Document], list[tuple[str, str]]]
    split: str = field(default="train", kw_only=True)


@dataclass(frozen=True)
class Analysis(_Parts["Subject"]):
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
        split: whose images it is of, unless --split says otherwise.
    """


@dataclass(frozen=True)
class Comparison(_Parts["Sequence[Subject]"]):
    """One analysis of several checkpoints of one model, on the same images.

    Its functions are those of an `Analysis`, with all subjects in the order of the command line. The document has a
    list ``checkpoints`` of what each is.

    Attributes:
        least: number of checkpoints.
        most: the same; None for any.
        whole: whether each process needs all the images, instead of a share of them.
        variant: of its arguments, what the files' names begin with, where results of several kinds lie side by side;
            None takes the name.
    """

    least: int = 1
    most: int | None = None
    whole: bool = False
    variant: Callable[[argparse.Namespace], str] | None = None


class Work:
    """What an analysis has done so far: kept in a journal, and shown.

    Attributes:
        journal: where parts that take long are kept.
        advance: tell that so many units are done.
    """

    def __init__(self, output: Output, advance: Callable[[int], None]) -> None:
        self.journal, self.advance = output.journal(), advance


def run(analysis: Analysis | Comparison, argv: Sequence[str]) -> None:
    """Make an analysis, unless it has been made, and show what it found."""
    if isinstance(analysis, Analysis):
        analysis = _of_one(analysis)
    parser = AnalysisParser(analysis.name, analysis.text, analysis.least, analysis.most, analysis.split)
    analysis.add_arguments(parser)
    arguments, flags = parser.parse_known_args(list(argv))
    parser.check(arguments, flags)
    own = analysis.settings(arguments)  # refuses what is out of range, before anything is read

    from lesam_dist.analysis.engine.output import Output  # here: --help and what is refused need no torch
    from lesam_dist.analysis.engine.several import load_all, read_sources, stem_of
    from lesam_dist.parallel.processes import process_group

    sources = read_sources(arguments.checkpoints, arguments.config, flags, averaged=arguments.ema)
    first, parallel = sources[0], sources[0].config.parallel
    with process_group(parallel.device, parallel.timeout_s) as world:
        images = {"samples": arguments.samples, "split": arguments.split, "seed": arguments.seed}
        subjects = load_all(sources, world, whole=analysis.whole, **images)
        images["samples"] = subjects[0].samples
        digests = [source.digest for source in sources]
        facts = {"images": subjects[0].images, "weights": digests[0] if analysis.most == 1 else digests}
        folder = arguments.output or first.folder / "analysis"
        kind = analysis.variant(arguments) if analysis.variant else analysis.name
        output = Output(folder, f"{kind}-{stem_of(sources)}", {**own, **images, **facts}, world, force=arguments.force)
        document = output.finished()
        if world.is_main and document is not None:
            print(f"{output.path('json')}: finished before")
        if document is None:
            document = _compute(analysis, arguments, subjects, output)
        if world.is_main:
            output.draw(analysis.draw(document))
            _show(analysis, document, output)


def _of_one(analysis: Analysis) -> Comparison:
    return Comparison(
        analysis.name,
        analysis.text,
        analysis.add_arguments,
        analysis.settings,
        lambda arguments, subjects: analysis.passes(arguments, subjects[0]),
        lambda arguments, subjects, work: analysis.compute(arguments, subjects[0], work),
        analysis.draw,
        analysis.rows,
        most=1,
        split=analysis.split,
    )


def _compute(
    analysis: Comparison, arguments: argparse.Namespace, subjects: Sequence[Subject], output: Output
) -> Document:
    from lesam_dist.data.commands import progress_bar

    forwards, backwards, what = analysis.passes(arguments, subjects)
    world = output.world
    if world.is_main:
        several = f" on {world.world_size} processes" if world.world_size > 1 else ""
        images = subjects[0].samples
        print(
            f"{what}: about {forwards} forward and {backwards} backward passes over {images} images{several}",
            flush=True,
        )
    begin = time.monotonic()
    bar = progress_bar(analysis.name, forwards + backwards) if world.is_main else nullcontext(_not_shown)
    with bar as advance:
        work = Work(output, advance)
        results = analysis.compute(arguments, subjects, work)
    each = [
        {"checkpoint": subject.source.name, "run": subject.source.folder.name} | subject.source.about
        for subject in subjects
    ]
    about = {"analysis": analysis.name} | (each[0] if analysis.most == 1 else {"checkpoints": each})
    document = output.write(results, about | {"seconds": round(time.monotonic() - begin, 1)})
    work.journal.remove()
    return document


def _show(analysis: Comparison, document: Document, output: Output) -> None:
    from lesam_dist.experiments.report import show

    names = [each["checkpoint"] for each in document.get("checkpoints", [document])]
    show((analysis.name, ", ".join(names)), analysis.rows(document))
    print(f"results: {output.path('json')}  (.png, .svg)")


def _not_shown(done: int) -> None:
    """On all processes but one."""
