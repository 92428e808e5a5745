"""A run that is stopped after any step, again and again, has the bits of one that never stopped; on other numbers of
processes it goes on with the samples that are left."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lesam_dist.config.command_line import parse
from lesam_dist.config.schema import Config
from lesam_dist.data.plan import Batch, Plan
from lesam_dist.errors import PreemptedError, SharedError
from lesam_dist.parallel.agreed import Agreed, Wish
from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.train import trainer as module
from lesam_dist.train.meter import TIMED
from lesam_dist.train.run import build_trainer
from lesam_dist.train.telemetry import read_metrics
from lesam_dist.train.trainer import Trainer
from tests.conftest import CLASSES, TRAIN
from tests.halves import Halved
from tests.parallel.processes import run

BATCH, EPOCHS = 12, 3
STEPS_PER_EPOCH = TRAIN * len(CLASSES) // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH
SMALL = (
    *("--config", "digits", "--data.builtin", "null", "--data.batch_size", str(BATCH), "--data.workers", "1"),
    *("--data.image_size", "8", "--data.val_resize", "8", "--epochs", str(EPOCHS)),
    *("--schedule.lr_warmup_epochs", "1", "--schedule.anneal_start_epoch", "2", "--logging.every_steps", "1"),
    *("--parallel.device", "cpu", "--logging.tensorboard", "false", "--resume", "auto"),
)
SGD = ("--optimizer.name", "sgd")
GSAM = ("--optimizer.name", "gsam", "--schedule.anneal_start_epoch", "null")
REUSE = ("--optimizer.ascent_interval", "3", "--optimizer.ascent_between", "reuse")
OWN = ("--optimizer.name", f"{__name__}:Own", "--schedule.anneal_start_epoch", "null")
EMA, FP16 = ("--ema.decay", "0.9"), ("--precision.compute", "fp16")
AUGMENTED = (
    *("--data.auto_augment", "randaugment", "--data.random_erasing", "0.5", "--data.repeats", "2"),
    *("--data.mixup", "0.2", "--data.cutmix", "1", "--data.mix_probability", "0.8"),
    *("--schedule.image_size", "[[0,8],[1,10]]", "--loss.name", "binary", "--loss.label_smoothing", "0.1"),
)
DALI, TORCHVISION = ("--data.backend", "dali"), ("--data.backend", "torchvision")


class Own(Halved, name="own", along="g and a part of the last one", keeps="the last g"):
    """Each process perturbs by its own gradient, and keeps that one."""

    def shares_first_gradient(self) -> None:
        return None


class StopAt(Agreed):
    """All processes stop after the same step, and save after some before it."""

    def __init__(self, stop: int | None, saves: tuple[int, ...] = ()) -> None:
        super().__init__()
        self._stop, self._saves = stop, saves

    def due(self, step: int) -> Wish | None:
        return "stop" if step == self._stop else "save" if step in self._saves else None


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors of a run on this process, by name."""
    state = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for index, kept in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
    if trainer.ema:
        state |= {f"ema.{name}": tensor for name, tensor in trainer.ema.state_dict().items()}
    return {name: local_shard(tensor).detach().clone() for name, tensor in state.items()}


def start(config: Config, world: Distributed, stop: int | None, saves: tuple[int, ...] = ()) -> Trainer:
    """One start of the program, to the end or until it is stopped."""
    trainer = build_trainer(config, replace(world, agreed=StopAt(stop, saves)))
    try:
        if stop is None:
            trainer.fit()
        else:
            with pytest.raises(PreemptedError, match=f"after step {stop}"):
                trainer.fit()
    finally:
        trainer.close()
    return trainer


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(run_dir)]


def whole_and_cut(
    world: Distributed, seed: int, root: str, folder: str, flags: tuple[str, ...], cuts: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """The state after a run without a stop and after one with some; and whether the logs are the same."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    argv = [*SMALL, "--data.root", root, "--seed", str(seed), *flags, "--run_dir"]
    whole = start(parse([*argv, f"{folder}/whole"]), world, None)
    for stop in (*sorted(draw.sample(range(1, STEPS), cuts)), None):
        torch.manual_seed(draw.randrange(2**31) + world.rank)  # what a process starts with does not matter
        cut = start(parse([*argv, f"{folder}/cut"]), world, stop)
    return state_of(whole), state_of(cut), timeless(Path(folder, "whole")) == timeless(Path(folder, "cut"))


CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp lesam dali ema": (2, (*DALI, *EMA)),
    "ddp gsam torchvision augmented": (2, (*TORCHVISION, *GSAM, *AUGMENTED)),
    "ddp own memory": (2, (*DALI, *OWN, "--optimizer.scope", "local")),
    "ddp reuse fp16": (2, (*DALI, *REUSE, *FP16)),
    "fsdp lesam ema": (2, (*DALI, *EMA, "--parallel.strategy", "fsdp")),
    "fsdp msam adamw": (
        2,
        (
            *(*DALI, "--parallel.strategy", "fsdp", "--optimizer.name", "msam", "--optimizer.base", "adamw"),
            *("--optimizer.lr", "0.01", "--schedule.anneal_start_epoch", "null"),
        ),
    ),
    "hsdp": (4, (*DALI, "--parallel.strategy", "hsdp", "--parallel.shard_size", "2", *EMA)),
    "hsdp own memory": (
        4,
        (
            *(*DALI, *OWN, "--parallel.strategy", "hsdp", "--parallel.shard_size", "2"),
            *("--optimizer.scope", "replica"),
        ),
    ),
}


FULL = ("ddp own memory", "ddp reuse fp16", "fsdp msam adamw", "hsdp", "hsdp own memory")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in FULL else n for n in CASES])
def test_a_run_cut_after_any_steps_has_the_same_bits(seed: int, images: Path, tmp_path: Path, name: str) -> None:
    world_size, flags = CASES[name]
    for rank, (whole, cut, same_log) in enumerate(
        run(whole_and_cut, world_size, seed, str(images), str(tmp_path), flags, 2)
    ):
        torch.testing.assert_close(cut, whole, rtol=0, atol=0, msg=lambda text, rank=rank: f"rank {rank}: {text}")
        assert same_log


class NoBatchNorm(nn.Sequential):
    """Its numbers do not depend on how a batch is split."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, len(CLASSES)))


def on_some(
    world: Distributed, root: str, folder: str, flags: tuple[str, ...], stop: int | None
) -> tuple[dict[str, Tensor], list[str]]:
    """One leg of a run without BatchNorm; its last weights, and every training file that this process was given."""
    torch.set_num_threads(1)
    given: list[str] = []
    original = Plan.epoch

    def listening(self: Plan, *args: int) -> Iterator[Batch]:
        for batch in original(self, *args):
            given.extend(batch.paths if self.train else [])
            yield batch

    Plan.epoch = listening  # type: ignore[method-assign,assignment]
    module.build.build_model = lambda task: _seeded()  # type: ignore[attr-defined]
    argv = [*SMALL, *DALI, "--data.root", root, *flags]
    trainer = start(parse([*argv, "--run_dir", folder]), world, stop)
    params = trainer.model.named_parameters()
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params}
    return {name: p.detach().clone() for name, p in weights.items()}, given


def _seeded() -> nn.Module:
    torch.manual_seed(5)
    return NoBatchNorm()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_a_run_goes_on_with_the_samples_left_on_other_numbers_of_processes(
    seed: int, images: Path, tmp_path: Path, strategy: str
) -> None:
    """Two processes, then three, then one: stopped in the middle of epochs."""
    flags = ("--seed", str(seed), "--parallel.strategy", strategy, "--optimizer.name", "msam", *("--epochs", "2"))
    flags += ("--schedule.anneal_start_epoch", "null")
    whole = run(on_some, 1, str(images), str(tmp_path / "whole"), flags, None)[0][0]
    first, second = sorted(random.Random(seed).sample(range(1, 2 * STEPS_PER_EPOCH), 2))
    bounds = ((2, 0, first), (3, first, second), (1, second, 2 * STEPS_PER_EPOCH))
    used: list[str] = []
    for world_size, begin, end in bounds:
        stop = None if end == 2 * STEPS_PER_EPOCH else end
        ranks = run(on_some, world_size, str(images), str(tmp_path / "run"), flags, stop)
        for _, given in ranks:
            used += given[: (end - begin) * BATCH // world_size]  # the rest was read ahead
        last = ranks[0][0]
    assert set(Counter(used).values()) == {2}, "each image once in each of two epochs"
    assert len(used) == 2 * STEPS_PER_EPOCH * BATCH
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


def test_scope_local_pins_the_number_of_processes(images: Path, tmp_path: Path) -> None:
    flags = ("--optimizer.scope", "local")
    run(whole_leg, 2, str(images), str(tmp_path), flags, 2)
    (refused,) = run(whole_leg, 1, str(images), str(tmp_path), flags, None)
    assert refused.startswith("cannot resume on 1 processes: the checkpoint is of 2, and optimizer.scope is local")


def whole_leg(world: Distributed, root: str, folder: str, flags: tuple[str, ...], stop: int | None) -> str:
    try:
        start(parse([*SMALL, *DALI, "--data.root", root, *flags, "--run_dir", folder]), world, stop)
    except SharedError as error:
        return str(error)
    return ""
