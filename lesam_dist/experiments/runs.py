"""Several runs that belong together: each setting with every seed, one after the other, in one process group.

    RUN_DIR/SETTING/seed_K/     a run, as `lesam-dist train` writes it

All settings are trained with one seed before the next seed begins, so that an interrupted experiment compares all of
them. A finished run is not touched again, and an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lesam_dist.config.checks import folder
from lesam_dist.config.command_line import read_command_line, show_help
from lesam_dist.config.methods import canonical
from lesam_dist.config.parser import Parser, examples
from lesam_dist.config.same_run import check_same_run
from lesam_dist.config.schema import Config
from lesam_dist.errors import DivergedError, UserError

if TYPE_CHECKING:
    from lesam_dist.parallel.processes import Distributed
    from lesam_dist.tasks.task import Metric

_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Setting:
    """One of what is compared: its name, its runs by seed, and a note for each thing adapted in their configs."""

    name: str
    runs: list[Config]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a setting: the task's metric after the last epoch by seed, nan where that run diverged.

    ``best`` is of each run's best epoch, see `best_evaluation`; ``cost`` is that of a step, see `sgd_steps`.
    """

    name: str
    values: list[float]
    best: list[float]
    cost: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1); nan for one seed."""
        return _std(self.values)

    @property
    def best_mean(self) -> float:
        return statistics.fmean(self.best)

    @property
    def best_std(self) -> float:
        return _std(self.best)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds of ``first - second`` with its standard error, which is nan for one seed.

    Seeds fix the first weights, the order and the augmentation, so the differences scatter less than the values do.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return statistics.fmean(differences), _std(differences) / math.sqrt(len(differences))


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


class ExperimentParser(Parser):
    """The flags that all experiments share; every other flag is one of `lesam-dist train`, for all runs."""

    def __init__(self, command: str, usage: str, description: str, config_help: str, example: str) -> None:
        start = f"torchrun --nproc-per-node 8 -m lesam_dist {command} ..."
        super().__init__(
            command,
            description,
            f"{examples(example)}\n\non several GPUs:\n  {start}\n\nfields of the runs:\n"
            f"  lesam-dist {command} --help.optimizer, or another section of lesam-dist train --help; --help.all",
            usage,
        )
        self.add_argument("--config", required=True, help=config_help)
        self.add_argument("--seeds", type=int, default=3, help="number of seeds; they are 0, 1, ... (default: 3)")
        self.add_argument(
            "--run_dir",
            type=lambda text: Path(folder("--run_dir", text)),
            default=Path("runs") / command,
            help=f"folder for all runs, the table and the plot (default: runs/{command}); start again with the same "
            "one to go on after an interruption",
        )

    def parse_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Own flags, and those for the runs.

        Raises:
            UserError: for a wrong or missing own flag, and for one that each run has another value of.
        """
        for word in argv:
            if word.startswith("--help."):  # a section of the fields of `lesam-dist train`
                show_help(word.removeprefix("--"))
        arguments, flags = self.parse_known_args(list(argv))
        if not 1 <= arguments.seeds <= _MOST_SEEDS:
            raise UserError(f"--seeds is {arguments.seeds}: it must be at least 1, and at most {_MOST_SEEDS}.")
        self.refuse(flags, ("seed", "resume", "dry_run", "print_config"))
        return arguments, flags

    def refuse(self, flags: Sequence[str], names: Sequence[str]) -> None:
        """Raise a UserError where one of these is among the flags for the runs."""
        for name in names:
            if any(canonical(flag.removeprefix("--").split("=")[0]) == canonical(name) for flag in flags):
                raise UserError(f"{self.prog} sets --{name} for each run: leave it out.")


def make_setting(name: str, sources: Sequence[str], flags: Sequence[str], run_dir: Path, seeds: int) -> Setting:
    """The runs of a setting: configs from ``sources`` (recipes, files, YAML text) with ``flags`` over them."""
    configs = [part for source in sources for part in ("--config", source)]

    own = ["--seed", "0", "--resume", "auto", "--run_dir", str(run_dir / name / "seed_0")]
    first = read_command_line([*configs, *flags, *own])
    runs = [copy.deepcopy(first.config) for _ in range(seeds)]
    for seed, config in enumerate(runs):
        config.seed, config.run_dir = seed, str(run_dir / name / f"seed_{seed}")
    return Setting(name, runs, first.notes)


def run_all(settings: Sequence[Setting], name: str, argv: Sequence[str]) -> tuple[list[Outcome], Metric, Distributed]:
    """Train every run that is not finished. A run that diverges has no result, and the others go on.

    Args:
        settings: all of them.
        name: of the command, as "compare".
        argv: behind its name. What ends it says how to go on, as its ``go_on``, once a run has a folder.

    Returns:
        The outcome of each setting, what they are compared by, and this process among all.

    Raises:
        UserError: as `lesam_dist.train.run.train`; a finished run whose config differs.
    """
    from lesam_dist.experiments.cost import sgd_steps
    from lesam_dist.parallel.processes import process_group  # here: --help and what is refused need no torch
    from lesam_dist.parallel.progress import Progress
    from lesam_dist.tasks.loading import task_class
    from lesam_dist.train.best import best_evaluation
    from lesam_dist.train.resume_command import experiment_command, saying_how_to_go_on
    from lesam_dist.train.run import train_here

    metric = task_class(settings[0].runs[0].task).metric
    costs = [sgd_steps(setting.runs[0]) for setting in settings]  # first, since it checks the hyper-parameters
    values: dict[str, list[float]] = {setting.name: [] for setting in settings}
    best: dict[str, list[float]] = {setting.name: [] for setting in settings}
    seeds = len(settings[0].runs)
    parallel = settings[0].runs[0].parallel
    progress, command = Progress(), experiment_command(name, argv)
    with (
        saying_how_to_go_on(command, progress),
        process_group(parallel.device, parallel.timeout_s, progress) as world,
    ):
        if world.is_main:
            for line in [f"{setting.name}: {note}" for setting in settings for note in setting.notes]:
                print(line, flush=True)
        for seed in range(seeds):
            for index, setting in enumerate(settings):
                config = setting.runs[seed]
                label = f"[{seed * len(settings) + index + 1}/{seeds * len(settings)}] {config.run_dir}"
                evaluation = _finished(config, world)
                if world.is_main:
                    print(f"{label}: finished before" if evaluation else label, flush=True)
                try:
                    value = (evaluation or train_here(config, world, command=command))[metric.name]
                    found = best_evaluation(Path(config.run_dir), metric) if world.is_main else None
                    values[setting.name].append(value)
                    best[setting.name].append(found.value if found else value)
                except DivergedError as error:
                    values[setting.name].append(math.nan)
                    best[setting.name].append(math.nan)
                    if world.is_main:
                        print(f"{config.run_dir}: {error}", flush=True)
    outcomes = [Outcome(s.name, values[s.name], best[s.name], cost) for s, cost in zip(settings, costs, strict=True)]
    return outcomes, metric, world


def _finished(config: Config, world: Distributed) -> dict[str, float] | None:
    """The last evaluation of a run that has reached its last epoch, on every rank; None where it is yet to be made."""
    from lesam_dist.train.checkpoint import Checkpointer

    found: dict[str, float] | None = None
    if world.is_main:
        progress = Checkpointer(Path(config.run_dir) / "checkpoints", world, config.checkpoint).progress()
        if progress is not None:
            try:
                check_same_run(config, progress["config"])
            except UserError as error:
                raise UserError(f"{config.run_dir}: {error}") from error
            if progress["epoch"] >= config.epochs and progress["finite"]:
                found = progress["evaluation"]
    shared: dict[str, float] | None = world.share(found)
    return shared
