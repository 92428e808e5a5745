"""The folder that a run's checkpoints lie in: which there are, which is to go on from, which are to stay."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lesam_dist.config.schema import CheckpointConfig
from lesam_dist.train.checkpoint import manifest
from lesam_dist.train.checkpoint.manifest import DamagedError

LATEST = "latest"


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step_"))


class Folder:
    """A folder of checkpoints, which need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Of all checkpoints, newest first."""
        found = [path.name for path in self.path.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
        return sorted((name for name in found if (self.path / name).is_dir()), key=step_of, reverse=True)

    def latest(self) -> str | None:
        """The one that was written last, where the folder says so."""
        pointer = self.path / LATEST
        name = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""
        return name if name in self.names() else None

    def candidates(self) -> list[str]:
        """Names of the checkpoints to go on from, best first: the one of `latest`, then those before it."""
        names, latest = self.names(), self.latest()
        return names if latest is None else names[names.index(latest) :]

    def content(self, name: str) -> dict[str, Any] | None:
        """What the manifest of a checkpoint says, where all files are there and have their sizes; else None."""
        try:
            content, files = manifest.read(self.path / name)
            for file, expected in files.items():
                manifest.check_size(self.path / name / file, expected)
        except DamagedError:
            return None
        return content

    def is_finite(self, name: str) -> bool:
        """Whether it was saved as finite."""
        return (self.content(name) or {}).get("finite") is True

    def best(self, names: Iterable[str]) -> str | None:
        """The one with the highest top-1 accuracy, of the averaged weights where they were evaluated; None without."""
        scores = {name: score(self.content(name) or {}) for name in names}
        return max((name for name in scores if scores[name] > -math.inf), key=lambda name: scores[name], default=None)

    def publish(self, aside: Path, name: str) -> None:
        """Give what was written aside its name, and point to it; whatever happens, one of both is whole."""
        target, replaced = self.path / name, self.path / f".{name}.replaced"
        manifest.sync_folder(aside)
        if target.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            aside.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        manifest.sync_folder(self.path)  # before anything points to it
        manifest.write_bytes(self.path / LATEST, name.encode())
        manifest.sync_folder(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed process began and did not finish; put back what it was about to replace."""
        for left in self.path.glob(".step_*.replaced"):
            target = self.path / left.name.removeprefix(".").removesuffix(".replaced")
            if not target.exists():
                with suppress(OSError):
                    left.rename(target)
        for left in self.path.glob(".step_*"):
            shutil.rmtree(left, ignore_errors=True)

    def prune(self, newest: str, config: CheckpointConfig) -> None:
        """Remove what is not kept, once the newest is on disk.

        Checkpoints after it are of a branch that the run has left by resuming from an older one: they go, whatever they
        are. Of those before it only whole ones go; one that is damaged is left to whoever wants to look at it.
        """
        names = self.names()
        older = names[names.index(newest) :]
        whole = [name for name in older if self.content(name) is not None]
        stay = {newest, *self.kept(whole, config)}
        for name in [*names[: names.index(newest)], *(name for name in whole if name not in stay)]:
            with suppress(OSError):
                remove(self.path / name)

    def kept(self, whole: list[str], config: CheckpointConfig) -> set[str]:
        """Which of these, newest first, the config keeps."""
        kept = set(whole[: config.keep])
        kept.update([name for name in whole if self.is_finite(name)][:1])
        if config.keep_every_epochs is not None:
            kept.update(name for name in whole if self._ends(name, config.keep_every_epochs))
        if config.keep_best and (best := self.best(whole)):
            kept.add(best)
        return kept

    def _ends(self, name: str, every: int) -> bool:
        ended = (self.content(name) or {}).get("epoch_end")
        return isinstance(ended, int) and ended > 0 and ended % every == 0


def result(progress: Mapping[str, Any]) -> tuple[str, float | None, bool]:
    """What a checkpoint is chosen by: its name, its value where there is one, and whether more is better.

    Of the averaged weights, where the run has some. It is the top-1 accuracy where a progress does not say.
    """
    metric, evaluation = progress.get("chosen_by") or progress.get("metric"), progress.get("evaluation")
    metric = metric if isinstance(metric, dict) else {}
    name, higher = str(metric.get("name", "acc1")), metric.get("higher_is_better", True) is True
    found = evaluation.get(f"ema_{name}", evaluation.get(name)) if isinstance(evaluation, dict) else None
    return name, float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None, higher


def score(progress: Mapping[str, Any]) -> float:
    """The same as a number that is higher for a better checkpoint; -inf where there is none."""
    _, value, higher = result(progress)
    return -math.inf if value is None else value if higher else -value


def remove(path: Path) -> None:
    """Take a checkpoint's name away first, so that a half removed one is never seen."""
    gone = path.parent / f".{path.name}.removed"
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def folder_in(path: Path) -> Path:
    """Where the checkpoints of a run lie, by the run's folder or by this one."""
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path
