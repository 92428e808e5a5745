"""A run from its config to its last evaluation: what is checked, built and agreed on before `Trainer` trains."""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from lesam_dist.config.checks import checked
from lesam_dist.config.schema import Config
from lesam_dist.data.loader import Loader
from lesam_dist.data.replay import ReplayLoader
from lesam_dist.errors import UserError
from lesam_dist.parallel.processes import Distributed, process_group
from lesam_dist.parallel.progress import Progress
from lesam_dist.tasks.classification.task import Classification
from lesam_dist.tasks.images.task import ImageTask
from lesam_dist.tasks.loading import build_task
from lesam_dist.tasks.task import Task
from lesam_dist.train import build
from lesam_dist.train.agreement import agree_on_data, agree_on_run_dir, agree_on_setup
from lesam_dist.train.boards.boards import require_boards
from lesam_dist.train.checkpoint import Checkpointer
from lesam_dist.train.class_names import write_classes
from lesam_dist.train.dry_run import shorten
from lesam_dist.train.flatness import LabelledBatch, read_images
from lesam_dist.train.flops import flops_of
from lesam_dist.train.initial import start_from
from lesam_dist.train.numerics import explain_nondeterminism, numerics
from lesam_dist.train.out_of_memory import explain_memory
from lesam_dist.train.preemption import preemption
from lesam_dist.train.resume_command import Command, run_command, saying_how_to_go_on
from lesam_dist.train.run_dir import claim
from lesam_dist.train.trainer import Trainer

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def train(config: Config, given: Collection[str] = (), words: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the config says, on the processes that torchrun started or alone.

    Args:
        config: the run.
        given: fields that a dry run leaves as they are, by dotted path; others it makes smaller on a CPU.
        words: of the command line, where there is one. An exception then says how to go on, as its ``go_on``, once the
            run has a folder.

    Returns:
        The last evaluation, see `evaluate`.

    Raises:
        UserError: for anything that the user can mend; raised before training where it can be known then.
        PreemptedError: a signal asked it to stop, and it has saved.
    """
    command = None if words is None else run_command(words, config)
    progress = Progress()
    parallel = config.parallel
    with (
        saying_how_to_go_on(command, progress),
        process_group(parallel.device, parallel.timeout_s, progress) as world,
    ):
        return train_here(config, world, given, command)


def train_here(
    config: Config,
    world: Distributed,
    given: Collection[str] = (),
    command: Command | None = None,
) -> dict[str, float]:
    """`train` in a process group that has been joined already, as for one run after the other."""
    config = checked(config)
    try:
        with numerics(config.precision, world.device):
            return _train_here(config, world, given, command)
    except (MemoryError, RuntimeError, OSError) as error:
        explained: UserError | None = explain_memory(error, config, str(world.progress.at), world.device.type)
        explained = explained or explain_nondeterminism(error, config.precision)
        if explained is None:
            raise
        raise explained from error


def _train_here(
    config: Config, world: Distributed, given: Collection[str], command: Command | None
) -> dict[str, float]:
    world.move("comparing its settings with the others'")
    agree_on_setup(config, world)
    if world.is_main:  # the others learn of an error from it
        require_boards(config.logging)
    task = build_task(config, world)  # refuses what it can before a data set of millions of files is scanned
    build.check_optimizer(config.optimizer, world.device)
    trainer = _dry_trainer(task, given) if config.dry_run else build_trainer(config, world, task)
    if command is not None and not config.dry_run:
        trainer.command, world.progress.resume = command, command.again()
    with preemption(world, config.checkpoint.grace_seconds, active=not config.dry_run):
        try:
            return trainer.fit()
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise UserError(
                f"run_dir '{config.run_dir}' cannot be written: {error}. Checkpoints on disk are whole: make room, "
                "then go on with --resume auto."
            ) from error
        finally:
            trainer.close()


def build_trainer(config: Config, world: Distributed, task: Task | None = None) -> Trainer:
    """The trainer of a run that is no dry run; claims the run's folder, which `Trainer.close` releases.

    Args:
        config: the run.
        world: this process among all.
        task: what the config's task is; None builds it.

    Raises:
        UserError: as `train`.
    """
    _require_reduction(config, world)
    task = task or build_task(config, world)
    world.move("listing the images")
    train, val = task.splits
    world.move("building the network and what reads the images")
    agree_on_data({"train": train, "val": val}, world)
    loaders = _loaders(task, task.loaders())
    measured = _measured(task)
    model = build.build_model(task)
    _start_from(task, model)
    run_dir = claim(config, world)
    world.progress.stacks = run_dir.path / "stacks"
    agree_on_run_dir(run_dir.path, world)
    if world.is_main and isinstance(task, ImageTask):
        write_classes(run_dir.path, task.splits[0].classes)
    flops = None
    if isinstance(task, Classification) and world.is_main:
        flops = flops_of(config, task.num_classes, world.device)
    return Trainer(task, model, loaders, run_dir, len(val), flops, measured)


def _start_from(task: Task, model: nn.Module) -> None:
    """Take the weights of ``init_from``, unless there is a checkpoint to go on from."""
    config, world = task.config, task.world
    saved = Checkpointer(Path(config.run_dir) / "checkpoints", world, config.checkpoint)
    if config.init_from is None or world.share(saved.exist()):
        return
    world.move("reading the weights of init_from")
    told = start_from(config, model, world, getattr(task.splits[0], "classes", None))
    if world.is_main:
        print(told, flush=True)


def _loaders(task: Task, loaders: tuple[Loader, Loader]) -> tuple[Loader, Loader]:
    """As the config has them read.

    Raises:
        UserError: a process's share of a batch cannot be divided into micro-batches.
    """
    data = task.config.data
    share = data.batch_size // task.world.world_size
    if share % data.micro_batches:
        raise UserError(
            f"data.micro_batches {data.micro_batches} does not divide the {share} images that each process takes of a "
            f"batch of {data.batch_size}: choose a divisor."
        )
    return _replayed(task, loaders)


def _replayed(task: Task, loaders: tuple[Loader, Loader]) -> tuple[Loader, Loader]:
    train, val = loaders
    return ReplayLoader(train) if task.config.data.replay else train, val


def _measured(task: Task) -> Sequence[LabelledBatch] | None:
    if not task.config.analysis.every_epochs:
        return None
    if not isinstance(task, ImageTask):
        raise UserError(
            f"analysis.every_epochs is {task.config.analysis.every_epochs}, but the task {type(task).__name__} is none "
            "on images: leave it null."
        )
    return read_images(task.config, task.splits[0], task.world)


def _dry_trainer(task: Task, given: Collection[str]) -> Trainer:
    shorten(task.config, task.world, given)
    loaders = _replayed(task, task.dry_loaders())
    return Trainer(task, build.build_model(task), loaders, run_dir=None)


def _require_reduction(config: Config, world: Distributed) -> None:
    if config.parallel.reduce_dtype != "fp32" and world.world_size == 1:
        raise UserError(
            f"parallel.reduce_dtype is {config.parallel.reduce_dtype} but this is a single process, which reduces "
            "nothing: leave it at fp32, or start several."
        )
