"""The validation images of a run: evaluated with its weights, and with their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from lesam_dist.data import Loader
from lesam_dist.parallel.processes import Distributed
from lesam_dist.train.ema import WeightAverage
from lesam_dist.train.evaluate import evaluate


class Validation:
    """Evaluates a model on all images of a loader.

    Args:
        model: not wrapped by DDP.
        loader: of this rank's share.
        world: this process among all.
        ema: an average of the model's weights, evaluated too.
        autocast: dtype of the forward, or None.
        memory_format: of the images.
        samples: number of images over all ranks, to check that all were counted; None checks nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        world: Distributed,
        *,
        ema: WeightAverage | None,
        autocast: torch.dtype | None,
        memory_format: torch.memory_format,
        samples: int | None,
    ) -> None:
        self._model, self._loader, self._world = model, loader, world
        self._ema, self._autocast, self._memory_format, self._samples = ema, autocast, memory_format, samples

    def try_out(self) -> None:
        """Evaluate one batch, which changes nothing: what is broken shows before an epoch has been spent."""
        self._world.move("evaluating one batch")
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            batches, count = islice(self._batches(), 1), min(1, len(self._loader))
            evaluate(self._model, batches, self._world, self._autocast, count=count)

    def run(self, leave: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """What `evaluate` gives, and the same of the average as ``ema_...``; None where a process has left.

        Args:
            leave: see `evaluate`.
        """
        result = self.of_weights(leave)
        if self._ema is None or result is None:
            return result
        with self._ema.swapped():
            averaged = self.of_weights(leave)
        if averaged is None:
            return None
        return result | {f"ema_{name}": averaged[name] for name in averaged if name != "samples"}

    def of_weights(self, leave: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """What `evaluate` gives for the weights that the model has now; None where a process has left.

        Raises:
            RuntimeError: not every image was counted once.
        """
        self._world.move("evaluating")
        batches, count = self._batches(), len(self._loader)
        result = evaluate(self._model, batches, self._world, self._autocast, count=count, leave=leave)
        if result is not None and self._samples is not None and result["samples"] != self._samples:
            raise RuntimeError(f"evaluation counted {result['samples']:.0f} of {self._samples} images")
        return result

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._loader.epoch(0):
            yield images.to(memory_format=self._memory_format), labels
