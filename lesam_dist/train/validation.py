"""The validation samples of a run: evaluated with its weights, and with their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import nn

from lesam_dist.data import Loader
from lesam_dist.errors import UserError
from lesam_dist.parallel.batch import Batch
from lesam_dist.parallel.processes import Distributed
from lesam_dist.tasks.task import Task
from lesam_dist.train.ema import WeightAverage
from lesam_dist.train.evaluate import evaluate
from lesam_dist.train.formats import in_format


class Validation:
    """Evaluates a model on all samples of a loader.

    Args:
        task: says what is measured.
        model: not wrapped by DDP.
        loader: of this rank's share.
        world: this process among all.
        ema: an average of the model's weights, evaluated too.
        autocast: dtype of the forward, or None.
        memory_format: of images.
        samples: number of them over all ranks, to check that all were counted; None checks nothing.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        loader: Loader,
        world: Distributed,
        *,
        ema: WeightAverage | None,
        autocast: torch.dtype | None,
        memory_format: torch.memory_format,
        samples: int | None,
    ) -> None:
        self._task, self._model, self._loader, self._world = task, model, loader, world
        self._ema, self._autocast, self._memory_format, self._samples = ema, autocast, memory_format, samples

    def try_out(self) -> None:
        """Evaluate one batch, which changes nothing: what is broken shows before an epoch has been spent."""
        self._world.move("evaluating one batch")
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            batches, count = islice(self._batches(), 1), min(1, len(self._loader))
            result = evaluate(self._model, batches, self._world, self._autocast, task=self._task, count=count)
        metric = self._task.metric.name
        for name in ("loss", metric):
            if result is not None and name not in result:
                raise UserError(
                    f"the task {type(self._task).__name__} is compared by {metric}, but report(sums) gave "
                    f"{', '.join(result)}: it must give {name}."
                )

    def run(self, leave: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """What `evaluate` gives, and the same of the average as ``ema_...``; None where a process has left.

        Args:
            leave: see `evaluate`.
        """
        result = self.of_weights(leave)
        if self._ema is None or result is None:
            return result
        self._ema.evaluated(result["loss"])
        with self._ema.swapped():
            averaged = self.of_weights(leave)
        if averaged is None:
            return None
        return result | {f"ema_{name}": averaged[name] for name in averaged if name != "samples"}

    def of_weights(self, leave: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """What `evaluate` gives for the weights that the model has now; None where a process has left.

        Raises:
            RuntimeError: not every sample was counted once.
        """
        self._world.move("evaluating")
        batches, count = self._batches(), len(self._loader)
        result = evaluate(self._model, batches, self._world, self._autocast, task=self._task, count=count, leave=leave)
        if result is not None and self._samples is not None and result["samples"] != self._samples:
            raise RuntimeError(f"evaluation counted {result['samples']:.0f} of {self._samples} samples")
        return result

    def _batches(self) -> Iterator[Batch]:
        for batch in self._loader.epoch(0):
            yield in_format(batch, self._memory_format)
