"""The contract between the trainer and what it learns. One class is one task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from lesam_dist.config.schema import Config
from lesam_dist.data.bad_files import BadFiles
from lesam_dist.data.loader import Loader
from lesam_dist.data.sampling import Samples
from lesam_dist.data.table import Table, TableLoader
from lesam_dist.errors import UserError
from lesam_dist.parallel.batch import Batch, samples_in
from lesam_dist.parallel.processes import Distributed


@dataclass(frozen=True)
class Metric:
    """What runs of a task are compared by.

    Attributes:
        name: its key in what `Task.report` gives.
        label: in words, for tables and plots.
        unit: behind the number.
        higher_is_better: or the lower, as of a loss.
        samples: what it is measured on, in words.
    """

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool = True
    samples: str = field(default="samples", compare=False)

    @property
    def title(self) -> str:
        """Label and unit, for an axis or a column."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class At:
    """Where in a run a step is.

    Attributes:
        step: its number, from 0.
        steps_per_epoch, epochs: of the run.
    """

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        """The epoch that the step is in, from 0."""
        return self.step // self.steps_per_epoch


class Task(ABC):
    """What a run learns. The trainer does the rest: passes, optimizer, processes, precision, checkpoints, logs.

    It is built on every process. The methods are called in the order in which they stand here.

    Args:
        config: of the run.
        world: this process among all.
        task_args: the config's ``task_args``, as keywords, for those that a subclass declares.

    Attributes:
        metric: what compare, sweep and reports look at.
        chosen_by: what the best checkpoint is chosen by; None takes the metric.
        bad_files: training files that could not be read, where a loader keeps them; it is counted in the log.
    """

    metric: ClassVar[Metric] = Metric("loss", "loss", higher_is_better=False)
    chosen_by: ClassVar[Metric | None] = None
    bad_files: BadFiles | None = None

    def __init__(self, config: Config, world: Distributed) -> None:
        self.config, self.world = config, world

    def check(self) -> None:  # noqa: B027 - there may be nothing to refuse
        """Refuse what can be known to be wrong before data are read.

        Raises:
            UserError: with the value, and what to do.
        """

    @abstractmethod
    def open_data(self) -> tuple[Samples, Samples]:
        """The training and the validation samples. All processes must find the same; their digests are compared."""

    @cached_property
    def splits(self) -> tuple[Samples, Samples]:
        """What `open_data` found."""
        return self.open_data()

    def loaders(self) -> tuple[Loader, Loader]:
        """Loaders of `splits` for this process; of two `Table` they need not be written."""
        train, val = self.splits
        if not (isinstance(train, Table) and isinstance(val, Table)):
            raise UserError(
                f"the task {type(self).__name__} has data of its own kind, and no loaders: return two Tables from "
                "open_data, or override loaders."
            )
        data = self.config.data
        sizes = ((train, True, data.batch_size), (val, False, data.eval_batch_size))
        first, second = (
            TableLoader(table, train=is_train, batch_size=size, seed=self.config.seed, world=self.world)
            for table, is_train, size in sizes
        )
        return first, second

    def dry_loaders(self) -> tuple[Loader, Loader]:
        """What a dry run reads: a task that can do without its data makes some up."""
        return self.loaders()

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The network, equal on all processes: torch is seeded. It is moved, wrapped and compiled by others."""

    def draw(self, batch: Batch, at: At) -> Batch:
        """What the passes of a step see of the loader's batch. Called once in a step, before its first pass.

        All that is random, and all that changes during a run, belongs here: the passes of a step must see the same.
        torch is seeded by (seed, step, rank). The batch may come back, or another; not one changed in place.
        """
        return batch

    def resting(self, names: Collection[str], at: At) -> Collection[str]:
        """Which parameters of the network, by name, this step neither perturbs nor updates; none as a rule.

        Their gradients are dropped, so that the optimizer keeps nothing of them either.
        """
        return ()

    @property
    def draw_passes(self) -> tuple[float, float]:
        """Forwards and backwards through the network that `draw` makes for each sample, for the log's FLOPs."""
        return 0, 0

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch or a part of it, 0-d. Called in every pass, at the weights or beside them.

        Args:
            model: in training mode, perhaps wrapped by DDP or FSDP2: to be called once. What needs several forwards
                makes them in the network's own ``forward``.
            batch: what `draw` gave, or some rows of it; not to be changed.
        """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of each sample, (B,): for methods that choose samples by it, as ESAM does with gamma below 1."""
        raise UserError(
            f"the task {type(self).__name__} has no losses(model, batch), which gives the loss of each sample: write "
            "it, or choose a method, or arguments, that do not select samples."
        )

    def count(self, batch: Batch) -> int | Tensor:
        """What `loss` is the mean over: by it micro-batches, and the shares of processes, are weighed.

        A number, or a 0-d tensor. The samples, unless a task says otherwise: of texts in one batch, which are not of
        one length, the mean is over tokens.
        """
        return samples_in(batch)

    @property
    def counts_samples(self) -> bool:
        """Whether `count` is the samples, of which all processes have as many: then a step need not add them up."""
        return type(self).count is Task.count

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor | float]:
        """What a batch adds to the evaluation: **sums** over its samples by name, ``loss`` and ``samples`` among them.

        Tensors of any shape, the same for every batch, or numbers. They are added up over batches and processes in
        float64. Under FSDP2 a process may be given an empty batch, while others have more of them.

        Args:
            model: in eval mode, without DDP.
            batch: of the validation loader.
        """

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What is logged, from the sums over all samples, float64 on the host: ``loss`` and the metric among it.

        The mean of each over the samples, unless a task says otherwise.
        """
        for name, total in sums.items():
            if total.ndim:
                raise UserError(
                    f"the task {type(self).__name__}: measure(model, batch) gives {name} of shape {list(total.shape)}: "
                    "sum it over the samples, or write report(sums)."
                )
        return {name: float(total / sums["samples"]) for name, total in sums.items() if name != "samples"}
