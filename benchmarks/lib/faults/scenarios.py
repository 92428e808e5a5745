"""The runs that are disturbed: small, and of every kind that keeps its state in another place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.faults.images import SIDE, TRAIN

EPOCHS, BATCH = 4, 8
STEPS = EPOCHS * TRAIN // BATCH
"""Steps of an undisturbed run."""


@dataclass(frozen=True)
class Scenario:
    """A run by its flags.

    Attributes:
        name: for the table and the command line.
        flags: of `lesam-dist train`, beside those that all have.
        world_size: processes.
        share: of the chains, relative to the others.
        passes: of a step.
        not_for: kinds of faults that it cannot have.
    """

    name: str
    flags: str
    world_size: int = 2
    share: int = 4
    passes: int = 2
    not_for: tuple[str, ...] = ()

    @property
    def without(self) -> set[str]:
        """Kinds of faults that it cannot have."""
        return {*self.not_for, *(("kill-perturbed", "kill-pass2") if self.passes < 2 else ())}

    def argv(self, data: Path, run_dir: Path, more: Sequence[str] = ()) -> list[str]:
        """All flags; the run resumes itself."""
        words = [f"--config digits --data.root {data} --data.builtin null --data.batch_size {BATCH}"]
        words += [f"--data.image_size {SIDE} --data.val_resize {SIDE} --data.horizontal_flip true --data.workers 1"]
        words += [f"--epochs {EPOCHS} --schedule.lr_warmup_epochs 1 --logging.every_steps 1"]
        words += ["--parallel.device cpu --parallel.timeout_s 60 --resume auto", self.flags]
        return [*" ".join(words).split(), "--run_dir", str(run_dir), *more]


_QUIET = "--logging.tensorboard false --schedule.anneal_start_epoch null"
_DALI, _PILLOW = "--data.backend dali", "--data.backend torchvision"
_EVERY, _EMA = "--checkpoint.every_steps", "--ema.decay 0.9"
_ASYNC = "--checkpoint.asynchronous always"
_LESAM = "--logging.tensorboard false --schedule.anneal_start_epoch 2"
_SGD = f"{_QUIET} --optimizer.name sgd --data.micro_batches 2"
_GSAM = f"{_QUIET} --optimizer.name gsam --optimizer.rho 0.05"
_MSAM = f"{_QUIET} --optimizer.name msam"
_LOCAL = "--schedule.anneal_start_epoch null --optimizer.scope local"
_ADAMW = "--optimizer.base adamw --optimizer.lr 0.01"
_FSDP = "--precision.channels_last false --parallel.strategy fsdp"
_HSDP = "--precision.channels_last false --parallel.strategy hsdp --parallel.shard_size 2"

SCENARIOS = (
    Scenario("ddp-lesam", f"{_LESAM} {_DALI} {_EVERY} 4", share=6),
    Scenario("ddp-lesam-ema", f"{_LESAM} {_PILLOW} {_EMA} {_ADAMW} --checkpoint.every_minutes 0.01"),
    Scenario("ddp-sgd", f"{_SGD} {_PILLOW} {_EVERY} 2 --checkpoint.keep 3", passes=1),
    Scenario("ddp-gsam", f"{_GSAM} {_DALI} {_EVERY} 5 {_ASYNC}"),
    Scenario("ddp-msam", f"{_MSAM} {_PILLOW} {_EVERY} 5 --checks.every_steps 7", passes=1),
    Scenario("ddp-fp16", f"{_LESAM} {_PILLOW} --precision.compute fp16 {_EVERY} 4", share=1),
    Scenario("ddp-local", f"{_LOCAL} {_DALI} {_EVERY} 7", share=2, not_for=("resized",)),
    Scenario("fsdp-lesam", f"{_LESAM} {_FSDP} {_PILLOW} {_EVERY} 4 {_ASYNC}"),
    Scenario("fsdp-gsam-ema", f"{_GSAM} {_FSDP} {_DALI} {_EMA}", share=3),
    Scenario(
        "hsdp-lesam", f"{_LESAM} {_HSDP} {_PILLOW} {_EVERY} 5", world_size=4, share=1, not_for=("resized", "link-cut")
    ),
)
