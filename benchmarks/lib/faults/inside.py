"""In a process of the run: it is `lesam-dist train`, with functions wrapped so that faults strike at named points.

Nothing in lesam_dist knows of this. What kills a process at a point is its own SIGKILL, which for the run is as one
from outside. Every point that strikes, and the images that each step consumes, are appended to files with single
writes: they are there when the process is not.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lesam_dist import cli
from lesam_dist.data import torchvision_loader
from lesam_dist.parallel import agreed
from lesam_dist.train import curves, preemption, run_dir
from lesam_dist.train import evaluate as evaluation
from lesam_dist.train.agreement import agree_on_setup
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.passes import Passes
from lesam_dist.train.trainer import Trainer
from lib.faults.images import numbers_of
from lib.faults.points import Action, Place

_LOOK = 0.05  # seconds
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Start:
    """One start of a run's processes.

    Attributes:
        number: of this start among those of the run.
        argv: of `lesam-dist train`.
        folder: where events, consumed images and output go; not the run's.
        run_dir: the run's.
        actions: what goes wrong.
    """

    number: int
    argv: Sequence[str]
    folder: Path
    run_dir: Path
    actions: Sequence[Action] = ()

    def output(self, rank: int) -> Path:
        """What a rank wrote to stdout and stderr."""
        return self.folder / f"output-{self.number}-{rank}"

    @property
    def events(self) -> Path:
        """A line for each action that struck."""
        return self.folder / f"events-{self.number}"

    @property
    def consumed(self) -> Path:
        """A line for each first pass of each rank, of all starts."""
        return self.folder / "consumed"


def enter(rank: int, environ: dict[str, str], start: Start, namespace: str | None = None) -> None:
    """Be rank ``rank`` of a run; returns never."""
    os.setsid()  # Ctrl-C is for the parent, which knows what to do
    if namespace is not None:
        _move_to_network(namespace)
    os.environ.update(environ)
    out = os.open(start.output(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    torch.set_num_threads(1)
    process = Process(rank, start)
    process.wrap()
    process.reach("start")
    sys.argv = ["lesam-dist", *start.argv]
    cli.run("train")


class Process:
    """Wraps what the faults need to know of, and strikes."""

    def __init__(self, rank: int, start: Start) -> None:
        self.rank, self._start = rank, start
        self._trainer: Trainer | None = None
        self._waiting = [a for a in start.actions if a.rank in (None, rank)]
        self._left = {id(action): action.point.after for action in self._waiting}
        self._lock = threading.RLock()
        self._readonly = False
        self._ballast: Path | None = None
        self._factor = 1.0  # of the loss of the coming pass, or NaN

    @property
    def step(self) -> int:
        """Updates made so far."""
        return 0 if self._trainer is None else self._trainer.step

    def reach(self, place: Place) -> None:
        """Do what is due here."""
        with self._lock:
            here = [a for a in self._waiting if a.point.place == place]
            due = [a for a in here if (a.point.step == self.step if a.always else a.point.step <= self.step)]
            for action in due:
                if self._left[id(action)] > 0:
                    self._left[id(action)] -= 1
                    continue
                if not action.always:
                    self._waiting.remove(action)
                self._tell(action)
                self._do(action)

    def wrap(self) -> None:
        """Put the points into this process."""
        _everywhere(curves.plot_curves, lambda *_: Path())  # half a second for a picture that nobody looks at
        _everywhere(agree_on_setup, self._around(agree_on_setup, "joined", None))
        _everywhere(run_dir.claim, self._around(run_dir.claim, None, "claimed"))
        _everywhere(evaluation.evaluate, self._around(evaluation.evaluate, "evaluate", "evaluated"))
        Checkpointer.save = self._around(Checkpointer.save, "save", "saved")
        Checkpointer.load_latest = self._around(Checkpointer.load_latest, "loading", "loaded")
        torchvision_loader.DataLoader = _without_workers
        self._wrap_trainer()
        self._wrap_passes()
        # Looks once a second are many in a training of weeks, and too few in one of two seconds.
        agreed._TICK = _LOOK
        preemption._LOOK = _LOOK
        sys.addaudithook(self._audit)

    def _around(self, function: Callable[..., Any], before: Place | None, after: Place | None) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                self.reach(before)
            result = function(*args, **kwargs)
            if after:
                self.reach(after)
            return result

        return wrapped

    def _wrap_trainer(self) -> None:
        make = Trainer.__init__

        @functools.wraps(make)
        def wrapped(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            make(trainer, *args, **kwargs)
            self._trainer = trainer
            self.reach("built")

        Trainer.__init__ = wrapped

    def _wrap_passes(self) -> None:
        call = Passes.__call__
        passes = 0
        of: Passes | None = None

        @functools.wraps(call)
        def wrapped(both: Passes, **kwargs: Any) -> Any:
            nonlocal passes, of
            passes, of = (passes + 1, of) if both is of else (1, both)
            images, targets = both.batch
            if passes == 1:
                self._record(images)
            loss, self._factor = both._loss_of, 1.0
            self.reach("pass1" if passes == 1 else "perturbed")
            if math.isnan(self._factor):
                both.batch = images * self._factor, targets
            elif self._factor != 1.0:
                both._loss_of = functools.partial(_times, self._factor, loss)
            result = call(both, **kwargs)
            both.batch, both._loss_of = (images, targets), loss
            self.reach("climbs" if passes == 1 else "stepped")
            return result

        Passes.__call__ = wrapped

    def _record(self, images: Tensor) -> None:
        assert self._trainer is not None
        numbers = numbers_of(images, self._trainer.config.data)
        world = self._trainer.world
        line = {"start": self._start.number, "rank": world.rank, "of": world.world_size, "step": self.step}
        line["images"] = numbers
        _append(self._start.consumed, line)

    def _tell(self, action: Action) -> None:
        line = {
            "rank": self.rank,
            "deed": action.deed,
            "place": action.point.place,
            "step": self.step,
            "pid": os.getpid(),
            "t": time.time(),
        }
        _append(self._start.events, line)

    def _do(self, action: Action) -> None:
        match action.deed:
            case "signal":
                os.kill(os.getpid(), int(action.value))
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "nan":
                self._factor = math.nan
            case "jump":
                self._factor = action.value
            case "clock":
                now = time.time
                time.time = lambda: now() + action.value  # type: ignore[assignment]
            case "unplug":
                _shut_connections()
            case "fill":
                self._fill(int(action.value))
            case "free":
                if self._ballast is not None:
                    self._ballast.unlink(missing_ok=True)
            case "readonly" | "writable":
                self._readonly = action.deed == "readonly"
            case "cut":
                pass  # the event is all

    def _fill(self, free: int) -> None:
        self._ballast = self._start.run_dir.parent / "ballast"
        disk = os.statvfs(self._ballast.parent)
        size = max(0, disk.f_bavail * disk.f_frsize - free)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python tells of every operation on files, before it is done."""
        if event == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event in _CHANGES:
            path = args[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.fsdecode(path)
        # rmtree names what it removes relative to an open folder
        if not (name.startswith(str(self._start.run_dir)) or (event != "open" and not name.startswith("/"))):
            return
        if self._readonly:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)
        self.reach("files")


def _times(factor: float, loss: Callable[..., Tensor], *args: Any) -> Tensor:
    return loss(*args) * factor


def _everywhere(function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Put a function in place of another in every module of lesam_dist that has imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lesam_dist":
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, replacement)


def _without_workers(*args: Any, **kwargs: Any) -> DataLoader[Any]:
    """A worker process imports torch for seconds; the main process decodes the same."""
    kwargs |= {"num_workers": 0, "multiprocessing_context": None, "persistent_workers": False, "prefetch_factor": None}
    return DataLoader(*args, **kwargs)


def _append(path: Path, line: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


def _shut_connections() -> None:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed by now, not connected, or no socket
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    copy.shutdown(socket.SHUT_RDWR)


def _move_to_network(namespace: str) -> None:
    import ctypes

    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    os.close(descriptor)
