"""The command that goes on with a run or with several, as its user typed it: the one place that makes it.

What a process was given behind the command's name it knows. What stood before, a launcher's own flags, stands in the
command lines of the processes above it, which end with the same words: torchrun, accelerate, a script around them.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from lesam_dist.config.flags import words_without
from lesam_dist.config.schema import Config
from lesam_dist.config.values import get
from lesam_dist.errors import DivergedError, PreemptedError
from lesam_dist.parallel.peers import PeerError
from lesam_dist.parallel.place import Place, find_place
from lesam_dist.parallel.progress import Progress
from lesam_dist.train.out_of_memory import NoMemoryError

_LAUNCHERS = ("torchrun", "accelerate", "accelerate-launch", "torchrun.sh", "mpirun", "mpiexec")
_SHELLS = ("bash", "sh", "dash", "zsh")
_OF_SCRIPT = (
    *("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RUN_ID", "MAX_RESTARTS"),
    *("SHUTDOWN_SECONDS", "PREEMPTED_STATUS", "OMP_NUM_THREADS"),
)  # what launch/torchrun.sh reads
_RESUME = ("--resume", "auto")
_NOT_STRETCHED = (
    *("optimizer.start_epoch", "optimizer.stop_epoch"),
    *("long_tail.reweight_epoch", "schedule.image_size"),
)  # what --epochs would stretch, and a run that is trained for longer must keep
_MOST = 16  # processes above this one that are looked at


@dataclass(frozen=True)
class Started:
    """A process as it was started: its command line, and the environment that it was given."""

    words: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunCommand:
    """How a run was started.

    Attributes:
        start: what stands before the trainer's own words, quoted for a shell.
        words: those of the command line of `lesam-dist train`.
        config: of the run.
    """

    start: str
    words: Sequence[str]
    config: Config

    def again(self, **flags: object) -> str:
        """The command that goes on with the run, with these flags in place of what it says of them."""
        return self._with({**flags, "run_dir": self.config.run_dir, "resume": "auto"})

    def anew(self, run_dir: str, flags: Mapping[str, object]) -> str:
        """The command of another run, from the start."""
        return self._with({**flags, "run_dir": run_dir, "resume": None})

    def _with(self, flags: Mapping[str, object]) -> str:
        words = words_without(self.words, flags)
        added = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        return " ".join([self.start, *map(shlex.quote, [*words, *added])])

    def after(self, error: BaseException) -> str:
        """What to tell the user of a run that an exception has ended, in one line."""
        config = self.config
        if isinstance(error, DivergedError):
            lower = {"optimizer.lr": f"{config.optimizer.lr / 2:g}"}
            tried = self.anew(f"{config.run_dir}_lr{lower['optimizer.lr']}", lower)
            return f"from where it is it would diverge again. With half the learning rate, from the start: {tried}"
        if isinstance(error, NoMemoryError):
            return (
                f"with one of these changes as a flag behind it, go on with: {self.again()}  (another batch_size, "
                "precision or strategy makes another run, which needs another --run_dir)"
            )
        return _go_on(error, self.again())

    def longer(self) -> str:
        """What to tell the user of a run that has finished."""
        epochs = 2 * self.config.epochs
        fixed = {path: get(self.config, path) for path in _NOT_STRETCHED}
        given = {path: json.dumps(value) for path, value in fixed.items() if value not in (None, 0)}
        return f"to train on, for {epochs} epochs in all: {self.again(epochs=epochs, **given)}"


@dataclass(frozen=True)
class ExperimentCommand:
    """How several runs were started that belong together; ``text``: the same again goes on with all of them."""

    text: str

    def again(self) -> str:
        return self.text

    def after(self, error: BaseException) -> str:
        """What to tell the user where an exception has ended one of the runs, in one line."""
        return _go_on(error, self.text)

    def longer(self) -> None:
        """Nothing: the table compares runs of one length."""


Command: TypeAlias = "RunCommand | ExperimentCommand"


def run_command(words: Sequence[str], config: Config) -> RunCommand:
    """How this process was started, as far as it can be known.

    Args:
        words: behind ``lesam-dist train``, or the same in another form.
        config: that they say.
    """
    return RunCommand(_started("train", words), tuple(words), config)


def experiment_command(name: str, words: Sequence[str]) -> ExperimentCommand:
    """The same for ``lesam-dist NAME`` and the words behind it."""
    return ExperimentCommand(" ".join([_started(name, words), *map(shlex.quote, words)]))


@contextmanager
def saying_how_to_go_on(command: Command | None, progress: Progress) -> Iterator[None]:
    """Within, an exception gets what to tell the user as its ``go_on``, once there is a run to go on with."""
    try:
        yield
    except BaseException as error:
        if command is not None and progress.resume:
            error.go_on = command.after(error)  # type: ignore[attr-defined]
        raise


def _go_on(error: BaseException, again: str) -> str:
    if isinstance(error, PreemptedError | PeerError | KeyboardInterrupt) or not isinstance(error, Exception):
        return f"go on with: {again}"
    return f"when that is mended, go on with: {again}"


def _started(name: str, words: Sequence[str]) -> str:
    own, place = Started(sys.orig_argv), find_place(os.environ)
    return start_of(words, own, processes_above(), place, os.environ, name)


def start_of(
    words: Sequence[str],
    own: Started,
    above: Iterable[Started],
    place: Place,
    environ: Mapping[str, str],
    name: str = "train",
) -> str:
    """What the user typed before the command's words, quoted for a shell.

    Args:
        words: behind the command's name.
        own: this process.
        above: its parent, the parent of that, and so on.
        place: of this process; says which launcher to write where none of ``above`` has the words.
        environ: of this process.
        name: of the command.
    """
    typed = own.words[: len(own.words) - len(words)] if _ends_with(own.words, words) else ["lesam-dist", name]
    found = Started([*typed, *words])
    for process in above:
        if not _ends_with(process.words, words) or not (words or _is_launcher(process.words)):
            break
        found = process
    if len(found.words) > len(typed) + len(words) or _is_launcher(found.words):
        typed = found.words[: len(found.words) - len(_given(found.words, words))]
        return _quoted(_as_typed(typed), found.environ)
    return " ".join([*_launcher(place, environ), *map(shlex.quote, _as_typed(typed))])


def processes_above() -> Iterator[Started]:
    """The parent of this process, the parent of that, and so on, as /proc has them; none where there is no /proc."""
    pid = os.getppid()
    with suppress(OSError, IndexError, ValueError):
        for _ in range(_MOST):
            folder = Path(f"/proc/{pid}")
            words = [os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")[:-1]]
            pairs = [os.fsdecode(pair).partition("=") for pair in (folder / "environ").read_bytes().split(b"\0")]
            yield Started(words, {name: value for name, _, value in pairs})
            pid = int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def _given(there: Sequence[str], words: Sequence[str]) -> Sequence[str]:
    """The trainer's words at the end of a command line: launch/torchrun.sh may have put --resume before them."""
    return words if not words or list(there[-len(words) :]) == list(words) else words[len(_RESUME) :]


def _ends_with(there: Sequence[str], words: Sequence[str]) -> bool:
    given = _given(there, words)
    is_shorter = len(given) < len(words)
    if is_shorter and (tuple(words[: len(_RESUME)]) != _RESUME or not given):
        return False
    return list(there[len(there) - len(given) :]) == list(given)


def _is_launcher(words: Sequence[str]) -> bool:
    return any(os.path.basename(word) in _LAUNCHERS for word in words[:3])


def _as_typed(words: Sequence[str]) -> list[str]:
    """A script without the interpreter that the system put before it, and a program by its name where that finds it."""
    typed = list(words)
    name = os.path.basename(typed[0])
    runs_file = len(typed) > 1 and os.path.isfile(typed[1]) and os.access(typed[1], os.X_OK)
    if runs_file and (name in _SHELLS or name.startswith("python")):
        typed.pop(0)
    name = os.path.basename(typed[0])
    there = shutil.which(name)
    if there is not None and os.path.isabs(typed[0]) and os.path.abspath(there) == os.path.abspath(typed[0]):
        typed[0] = name
    return typed


def _quoted(words: Sequence[str], environ: Mapping[str, str]) -> str:
    names = _OF_SCRIPT if any(os.path.basename(word) == "torchrun.sh" for word in words) else ()
    own = [f"{name}={shlex.quote(environ[name])}" for name in names if name in environ]
    return " ".join([*own, *map(shlex.quote, words)])


def _launcher(place: Place, environ: Mapping[str, str]) -> list[str]:
    """A launcher's beginning from what it says in the environment."""
    nodes = max(1, place.world_size // place.local_world_size)
    if place.launcher == "srun":
        return ["srun", "--nodes", environ.get("SLURM_STEP_NUM_NODES", str(nodes)), "--ntasks", str(place.world_size)]
    return ["mpirun", "-n", str(place.world_size)] if place.launcher == "mpirun" else []
