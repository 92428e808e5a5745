"""The console script `lesam-dist`, and how every command reports what a user can mend."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from typing import NoReturn

from lesam_dist import __version__
from lesam_dist.errors import PreemptedError, UserError, unknown_name
from lesam_dist.guide.welcome import WELCOME, usage
from lesam_dist.parallel.place import Place, find_place
from lesam_dist.parallel.report import (
    end_with_launcher,
    ends_with_any_thread,
    report_failure,
    report_remedy,
    report_stop,
)
from lesam_dist.parallel.signals import preempted_status
from lesam_dist.parallel.stacks import dump_on_signals


def _train(argv: Sequence[str]) -> None:
    from lesam_dist.config.command_line import read_command_line

    read = read_command_line(argv)
    if find_place(os.environ).rank == 0:
        for note in read.notes:
            print(note, flush=True)
    from lesam_dist.train.run import train  # here: --help and what is refused need no torch

    train(read.config, read.given, argv)


def _compare(argv: Sequence[str]) -> None:
    from lesam_dist.experiments.compare import compare

    compare(argv)


def _sweep(argv: Sequence[str]) -> None:
    from lesam_dist.experiments.sweep import sweep

    sweep(argv)


def _domains(argv: Sequence[str]) -> None:
    from lesam_dist.experiments.domains import domains

    domains(argv)


def _plan(argv: Sequence[str]) -> None:
    from lesam_dist.planning.command import plan

    plan(argv)


def _analyze(argv: Sequence[str]) -> None:
    from lesam_dist.analysis.command import analyze

    analyze(argv)


def _report(argv: Sequence[str]) -> None:
    from lesam_dist.report.command import report

    report(argv)


def _eval(argv: Sequence[str]) -> None:
    from lesam_dist.train.eval_command import evaluate_command

    evaluate_command(argv)


def _predict(argv: Sequence[str]) -> None:
    from lesam_dist.train.predict_command import predict_command

    if status := predict_command(argv):
        sys.exit(status)


def _export(argv: Sequence[str]) -> None:
    from lesam_dist.train.checkpoint.export import export

    export(argv)


def _checkpoints(argv: Sequence[str]) -> None:
    from lesam_dist.train.checkpoint.listing import checkpoints

    checkpoints(argv)


def _scan(argv: Sequence[str]) -> None:
    from lesam_dist.data.scan import scan

    if status := scan(argv):
        sys.exit(status)


def _index(argv: Sequence[str]) -> None:
    from lesam_dist.data.index_command import index

    if status := index(argv):
        sys.exit(status)


def _pack(argv: Sequence[str]) -> None:
    from lesam_dist.data.packed.command import pack

    if status := pack(argv):
        sys.exit(status)


def _recipes(argv: Sequence[str]) -> None:
    from lesam_dist.guide.recipes import recipes_command

    recipes_command(argv)


def _methods(argv: Sequence[str]) -> None:
    from lesam_dist.guide.methods import methods_command

    methods_command(argv)


def _doctor(argv: Sequence[str]) -> None:
    from lesam_dist.doctor.command import doctor

    if status := doctor(argv, _missing_packages()):
        sys.exit(status)


def _completion(argv: Sequence[str]) -> None:
    from lesam_dist.guide.completion import completion

    completion(argv, {name: command for name, (command, _) in _COMMANDS.items()})


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train a network"),
    "compare": (_compare, "train several methods with several seeds, and compare them"),
    "scan": (_scan, "find the images of a data set that cannot be decoded"),
    "index": (_index, "list a large data set once, so that runs start at once"),
    "pack": (_pack, "pack a data set into tar shards, smaller ones if you like"),
    "sweep": (_sweep, "train with several values of one field, and compare them"),
    "domains": (_domains, "train on each domain in turn, and test on the others"),
    "plan": (_plan, "predict what a run takes on any number of GPUs"),
    "analyze": (_analyze, "see how flat the loss is around a checkpoint"),
    "report": (_report, "one HTML file about runs: curves, analyses, cost"),
    "eval": (_eval, "evaluate a checkpoint as its run does"),
    "predict": (_predict, "the classes of images, by a checkpoint"),
    "export": (_export, "the weights of a checkpoint as one safetensors file"),
    "checkpoints": (_checkpoints, "list, verify and remove a run's checkpoints"),
    "doctor": (_doctor, "whether this machine has what a run needs, and what to do"),
    "recipes": (_recipes, "list recipes, look for one, see what it sets and costs"),
    "methods": (_methods, "the methods: formula, cost, arguments and their defaults"),
    "completion": (_completion, "a script by which bash or zsh complete all of this"),
}

# What a command imports and the library does without: modules, and their packages in the extra "train".
_TRAIN_EXTRA = {
    "numpy": "numpy",
    "PIL": "pillow",
    "torchvision": "torchvision",
    "jsonargparse": "jsonargparse",
    "docstring_parser": "docstring-parser",  # of jsonargparse[signatures]
    "yaml": "pyyaml",
    "rich": "rich",
    "safetensors": "safetensors",
    "simplejpeg": "simplejpeg",
    "fsspec": "fsspec",
    "tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
}


_LOOKS = ("doctor",)  # it says itself which packages are missing, and what is wrong with the launcher's variables
_TRAINING = ("train", "compare", "sweep", "domains")
_PIPE_CLOSED = 141  # as the shell has it of a program that SIGPIPE ends


def main() -> NoReturn:
    """Entry point of `lesam-dist COMMAND ...`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "--version"):
        try:
            if sys.argv[1:2] == ["--version"]:
                print(f"lesam-dist {__version__}")
            else:
                _show_usage(everything=len(sys.argv) > 1)
        except BrokenPipeError:
            _leave(_PIPE_CLOSED)
        _leave(0 if len(sys.argv) > 1 else 2)
    command = sys.argv.pop(1)
    run(command)


def _show_usage(everything: bool) -> None:
    """The list of all commands, or what one does first."""
    texts = {name: text for name, (_, text) in _COMMANDS.items()}
    print(usage(texts) if everything else WELCOME.format(version=__version__), end="\n" if everything else "")
    if missing := _missing():
        print(f"\nEvery command but doctor needs {missing}")


def run(command: str) -> NoReturn:
    """Run a command on the process's arguments and exit: status 2 and one line for a `UserError`.

    Of several processes each says what is its own fault, with its rank; what several share is said once per node.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a terminal may not have every character
    place = Place()
    try:
        if command not in _LOOKS:
            place = find_place(os.environ)
        if place.launcher not in ("", "hand"):  # a shell may end before what it started
            end_with_launcher()
        dump_on_signals(place)
        if command not in _COMMANDS:
            raise unknown_name("command", command, _COMMANDS)
        missing = "" if command in _LOOKS else _missing()
        if missing:  # all at once, and before a run that would need the last of them at its end
            raise UserError(f"lesam-dist {command} needs {missing}")
        with ends_with_any_thread(place):
            _COMMANDS[command][0](sys.argv[1:])
    except PreemptedError as error:
        report_stop(place, str(error), error)
        _leave(preempted_status(), at_once=place.world_size > 1)
    except UserError as error:
        if not getattr(error, "same_node", False):
            report_failure(place, error)
        report_remedy(place, error)
        _leave(2)
    except KeyboardInterrupt as error:
        report_stop(place, "interrupted", error)
        _leave(130)
    except SystemExit as left:  # by --help, or with a status of the command's own
        if isinstance(left.code, str):
            raise
        _leave(left.code or 0)
    except BrokenPipeError as error:
        if not _nobody_reads():  # another pipe
            _fail(place, error)
        if command in _TRAINING and place.rank == 0:
            print("lesam-dist: ended, as what read its output has", file=sys.stderr, flush=True)
            report_remedy(place, error)
        _leave(_PIPE_CLOSED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _fail(place, error)
        what = f" for '{error.filename}'" if error.filename else ", perhaps where the output goes"
        report_failure(place, UserError(f"{error.strerror}{what}: make room, then give the same command again."))
        report_remedy(place, error)
        _leave(2)
    except Exception as error:
        _fail(place, error)
    _leave(0)


def _missing() -> str:
    """The packages of the extra "train" that are not installed, and how to install them; "" where all are."""
    missing = _missing_packages()
    return f'packages that are not installed ({", ".join(missing)}): pip install "lesam-dist[train]"' if missing else ""


def _missing_packages() -> list[str]:
    return [package for module, package in _TRAIN_EXTRA.items() if find_spec(module) is None]


def _fail(place: Place, error: Exception) -> NoReturn:
    """With a traceback: a fault of the program."""
    if place.world_size == 1:
        report_remedy(place, error)
        raise error
    report_failure(place, error)
    report_remedy(place, error)
    _leave(1)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended, as of `lesam-dist plan ... | head`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll, or no file: not a pipe either
        return False


def _flushed(status: int) -> int:
    """The status to end with when what is printed has arrived, or cannot."""
    if sys.stdout is None:  # closed from the start
        return status
    try:
        sys.stdout.flush()
        return status
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"lesam-dist: error: the output cannot be written: {error.strerror or error}.", file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)  # else the interpreter says at its end that it cannot flush
        os.dup2(nowhere, sys.stdout.fileno())
        failed = _PIPE_CLOSED if isinstance(error, BrokenPipeError) else 2
        return status or failed


def _leave(status: int, at_once: bool = False) -> NoReturn:
    """End the process; at once where it is about to be killed, as tearing the interpreter down takes seconds."""
    status = _flushed(status)
    distributed = sys.modules.get("torch.distributed")
    in_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if at_once or in_group:  # a group with unfinished operations can keep the interpreter from ending
        os._exit(status)
    sys.exit(status)
