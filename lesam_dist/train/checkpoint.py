"""Checkpoints that are whole or absent: written aside, renamed, pointed to by `latest`, checked before they are read.

    RUN_DIR/checkpoints/
      step_00000240/     torch.distributed.checkpoint files, and manifest.json with the progress and their checksums
      latest             the name of the newest

Every process takes part in saving and loading; on several nodes RUN_DIR must be a shared file system.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from lesam_dist.errors import SharedError, UserError
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train import manifest
from lesam_dist.train.ema import WeightAverage
from lesam_dist.train.manifest import DamagedError, Files
from lesam_dist.train.reader import Planner, Reader


class Checkpointer:
    """Saves and loads a model, its optimizer and the progress of a run.

    Args:
        folder: where the checkpoints lie; made on the first save.
        keep: how many of the newest stay on disk. The newest that was saved as ``finite`` stays in any case.
        world: this process among all.
    """

    def __init__(self, folder: Path, keep: int, world: Distributed) -> None:
        self.folder, self.keep, self.world = folder, keep, world

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        progress: dict[str, Any],
        ema: WeightAverage | None = None,
        *,
        finite: bool = True,
    ) -> None:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            step: updates made so far; names the checkpoint.
            model, optimizer, ema: what to save.
            progress: must be JSON and equal on all ranks.
            finite: whether the last step and all weights were finite, so that a run can go on from here.

        Raises:
            UserError: where it cannot be written (no space, no permission); older checkpoints are untouched.
        """
        target = self.folder / _name(step)
        aside = self.folder / f".{target.name}.partial"
        state = _state(model, optimizer, ema)
        try:
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.world.barrier()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
                save(state, checkpoint_id=aside)
            files = self._written(aside)
            if self.world.is_main:
                self._publish(aside, target, {"step": step, "finite": finite, **progress}, files)
        except (OSError, CheckpointException) as error:
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            kind = SharedError if isinstance(error, CheckpointException) else UserError
            raise kind(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}. Older "
                "checkpoints are untouched: make room, then go on with --resume auto."
            ) from error
        self.world.barrier()

    def amend(self, step: int, progress: dict[str, Any]) -> None:
        """Add to the progress in a checkpoint, or replace parts of it; call it on every rank.

        Raises:
            OSError: where it cannot be written; the checkpoint is then as it was.
            UserError: where somebody else has changed it.
        """
        if self.world.is_main:
            try:
                content, files = manifest.read(self.folder / _name(step))
            except DamagedError as error:
                raise UserError(f"a checkpoint was changed while the run was writing it: {error}") from error
            manifest.write(self.folder / _name(step), {**content, **progress, "files": files})

    def load_latest(
        self, model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None = None
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest whole checkpoint into model, optimizer and average, after every file has been verified.

        Returns:
            Its progress, None where there is no checkpoint at all; and a line for each damaged one passed over.

        Raises:
            UserError: where there are checkpoints but none is whole, or it is of another model.
        """
        damaged: list[str] = []
        for name in self.world.share(self._candidates() if self.world.is_main else None):
            progress, files, fault = self._verified(name)
            if fault is None:
                self._load(self.folder / name, files, model, optimizer, ema)
                return progress, damaged
            damaged.append(fault)
        if damaged:
            raise SharedError("no checkpoint can be read:\n  " + "\n  ".join(damaged))
        return None, []

    def exist(self) -> bool:
        """Whether there is any, whole or not."""
        return bool(self._names())

    def last_finite(self) -> Path | None:
        """The newest that was saved as ``finite``; None where there is none."""
        return next((self.folder / name for name in self._candidates() if self._is_finite(name)), None)

    def progress(self) -> dict[str, Any] | None:
        """The progress of the newest checkpoint that looks whole, without reading its data; None where there is none.

        Call it on one rank.
        """
        for name in self._candidates():
            try:
                content, files = manifest.read(self.folder / name)
                for file, expected in files.items():
                    manifest.check_size(self.folder / name / file, expected)
            except DamagedError:
                continue
            return content
        return None

    def _verified(self, name: str) -> tuple[dict[str, Any], Files, str | None]:
        """Progress and files of a checkpoint, and what is wrong with it; each rank reads a share of the files."""
        found: tuple[dict[str, Any], Files, str | None] = {}, {}, None
        if self.world.is_main:
            try:
                found = *manifest.read(self.folder / name), None
            except DamagedError as error:
                found = {}, {}, str(error)
        progress, files, fault = self.world.share(found)
        if fault is None:
            faults = self.world.gather(self._fault_of_share(self.folder / name, files))
            fault = next((text for text in faults if text is not None), None)
        return progress, files, fault

    def _fault_of_share(self, checkpoint: Path, files: Files) -> str | None:
        names = sorted(files)[self.world.rank :: self.world.world_size]
        try:
            manifest.verify(checkpoint, {name: files[name] for name in names})
            if self.world.is_main:
                Reader(checkpoint, files).read_metadata()
        except DamagedError as error:
            return str(error)
        except Exception as error:  # whatever a pickle of data alone can raise
            return f"{checkpoint / '.metadata'} cannot be read: {_reason(error)}"
        return None

    def _load(
        self, checkpoint: Path, files: Files, model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None
    ) -> None:
        state = _state(model, optimizer, ema)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
                load(state, storage_reader=Reader(checkpoint, files), planner=Planner())
        except (OSError, CheckpointException, pickle.UnpicklingError) as error:
            raise SharedError(
                f"the checkpoint {checkpoint} cannot be loaded into this run: {_reason(error)}"
            ) from error
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _written(self, folder: Path) -> Files:
        """The checksums of all files in a new checkpoint; each rank reads what it wrote."""
        own = [
            path.name
            for path in folder.iterdir()
            if path.name.startswith(f"__{self.world.rank}_") or (self.world.is_main and not path.name.startswith("__"))
        ]
        merged: Files = {}
        for part in self.world.gather(manifest.checksums(folder, sorted(own))):
            merged |= part
        return merged

    def _publish(self, aside: Path, target: Path, progress: dict[str, Any], files: Files) -> None:
        versions = {"torch": torch.__version__, "world_size": self.world.world_size}
        manifest.write(aside, {**progress, **versions, "files": files})
        replaced = self.folder / f".{target.name}.replaced"
        if target.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        aside.rename(target)
        pointer = self.folder / ".latest.partial"
        pointer.write_text(target.name)
        pointer.replace(self.folder / "latest")
        self._prune(target.name)

    def _prune(self, newest: str) -> None:
        """Remove what is not kept, what was begun and not finished, and checkpoints newer than this one.

        Newer ones are of a branch that the run has left by resuming from an older checkpoint.
        """
        names = self._names()
        kept = names[names.index(newest) :][: self.keep]
        older = (name for name in names[names.index(newest) :] if self._is_finite(name))
        kept.append(next(older, newest))
        leftovers = [path.name for path in self.folder.glob(".step_*")]
        for name in [*(name for name in names if name not in kept), *leftovers]:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _is_finite(self, name: str) -> bool:
        try:
            return manifest.read(self.folder / name)[0].get("finite") is True
        except DamagedError:
            return False

    def _names(self) -> list[str]:
        """Names of the checkpoints, newest first."""
        found = [path.name for path in self.folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
        return sorted((name for name in found if (self.folder / name).is_dir()), key=_step, reverse=True)

    def _candidates(self) -> list[str]:
        """Names of the checkpoints to go on from, best first: the one of `latest`, then those before it."""
        names = self._names()
        pointer = self.folder / "latest"
        latest = pointer.read_bytes().decode(errors="replace").strip() if pointer.is_file() else ""
        return names[names.index(latest) :] if latest in names else names


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def _state(model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    return state if ema is None else {**state, "ema": ema.state_dict()}


def _reason(error: BaseException) -> str:
    """The first line of the deepest cause: torch.distributed.checkpoint wraps what went wrong on which rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    if "unexpected pos" in text:  # what torch makes of a file that took less than was written
        below = error.__cause__ or error.__context__  # known on the rank that it happened on
        return str(below) if isinstance(below, OSError) else "a file could not be written to its end: no space left?"
    return text
