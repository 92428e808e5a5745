"""Checkpoints that are whole or absent: written aside, renamed, pointed to by `latest`, checked before they are read.

    RUN_DIR/checkpoints/
      step_00000240/     torch.distributed.checkpoint files, and manifest.json with the progress and every file's size
      latest             the name of the newest

Every process takes part in saving and loading; on several nodes RUN_DIR must be a shared file system.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from lesam_dist.errors import UserError
from lesam_dist.parallel import Distributed
from lesam_dist.train.ema import WeightAverage

_MANIFEST = "manifest.json"


class Checkpointer:
    """Saves and loads a model, its optimizer and the progress of a run.

    Args:
        folder: where the checkpoints lie; made on the first save.
        keep: how many of the newest stay on disk.
        here: this process among all.
    """

    def __init__(self, folder: Path, keep: int, here: Distributed) -> None:
        self.folder, self.keep, self.here = folder, keep, here

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        progress: dict[str, Any],
        ema: WeightAverage | None = None,
    ) -> None:
        """Write a checkpoint.

        Args:
            step: updates made so far; names the checkpoint.
            model, optimizer, ema: what to save.
            progress: must be JSON and equal on all ranks.

        Raises:
            UserError: where it cannot be written (no space, no permission); older checkpoints are untouched.
        """
        target = self.folder / f"step_{step:08d}"
        aside = self.folder / f".{target.name}.partial"
        state = _state(model, optimizer, ema)
        try:
            if self.here.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.here.barrier()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
                save(state, checkpoint_id=aside)
            if self.here.is_main:
                self._publish(aside, target, {"step": step, **progress})
        except (OSError, CheckpointException) as error:
            if self.here.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}. Older "
                "checkpoints are untouched: make room, then go on with --resume auto."
            ) from error
        self.here.barrier()

    def load_latest(
        self, model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None = None
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Load the newest whole checkpoint into model, optimizer and average.

        Returns:
            Its progress, None where there is no checkpoint at all; and a line for each damaged one passed over.

        Raises:
            UserError: where there are checkpoints but none is whole.
        """
        chosen: list[Any] = [None, []]
        if self.here.is_main:
            chosen = list(self._newest_whole())
        if self.here.world_size > 1:
            dist.broadcast_object_list(chosen, src=0)
        name, damaged = chosen
        if name is None:
            if damaged:
                raise UserError("no checkpoint can be read:\n  " + "\n  ".join(damaged))
            return None, []
        state = _state(model, optimizer, ema)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
            load(state, checkpoint_id=self.folder / name)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        progress: dict[str, Any] = json.loads((self.folder / name / _MANIFEST).read_text())
        return progress, damaged

    def progress(self) -> dict[str, Any] | None:
        """The progress of the newest whole checkpoint without loading it; None where there is none."""
        name, _ = self._newest_whole()
        return None if name is None else json.loads((self.folder / name / _MANIFEST).read_text())

    def _publish(self, aside: Path, target: Path, progress: dict[str, Any]) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
        manifest = {
            **progress,
            "torch": torch.__version__,
            "world_size": self.here.world_size,
            "files": sizes,
        }
        (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        if target.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(target)
        aside.rename(target)
        pointer = self.folder / ".latest.partial"
        pointer.write_text(target.name)
        pointer.replace(self.folder / "latest")
        for old in self._names()[self.keep :]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def _names(self) -> list[str]:
        """Names of the checkpoints, newest first."""
        return sorted((path.name for path in self.folder.glob("step_*") if path.is_dir()), reverse=True)

    def _newest_whole(self) -> tuple[str | None, list[str]]:
        names = self._names()
        pointer = self.folder / "latest"
        if pointer.is_file() and (latest := pointer.read_text().strip()) in names:
            names = [latest, *(name for name in names if name < latest)]
        damaged: list[str] = []
        for name in names:
            fault = _fault(self.folder / name)
            if fault is None:
                return name, damaged
            damaged.append(fault)
        return None, damaged


def _state(model: nn.Module, optimizer: Optimizer, ema: WeightAverage | None) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    return state if ema is None else {**state, "ema": ema.state_dict()}


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint / _MANIFEST} cannot be read ({_reason(error)})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is truncated: {path.stat().st_size} of {size} bytes"
    return None


def _reason(error: BaseException) -> str:
    """The first line of the deepest cause: torch.distributed.checkpoint wraps what went wrong on which rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
