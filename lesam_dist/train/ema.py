"""A moving average of the weights, after each update t = 0, 1, ...

    average <- d_t * average + (1 - d_t) * weights

exponential:  d_t = min(decay, (1 + t) / (10 + t))
uniform:      1 - d_t = 1 / max(1, t - start + 3)

The exponential one begins as the initial weights, which the warm-up of d_t soon forgets (TensorFlow's
ExponentialMovingAverage with num_updates). The uniform one is a copy of the weights until update ``start``, counted
from 1, makes it the mean of all weights since, the last copied ones among them: the average of ERM++ (Teterwak et al.,
2025), as DomainBed has it. Floating buffers are averaged too: BatchNorm's running statistics of
the last weights are not those of their average. A skipped update leaves everything as it was, and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lesam_dist.parallel.processes import Distributed
from lesam_dist.parallel.shards import local_shard
from lesam_dist.parallel.wrapping import reshard
from lesam_dist.train.batchnorm import average_over_ranks


class WeightAverage:
    """The average of a model's parameters and floating buffers, in float32 or better; of its shards on each process.

    Args:
        model: wrapped already where it is sharded: FSDP2 replaces the parameters.
        decay: share of the average that an update keeps in the end, in [0, 1).
        uniform_from: instead of ``decay``: the first update that is averaged and not copied, counted from 1.

    Attributes:
        decided_by_evaluation: what the average is depends on `evaluated`, so a checkpoint is saved after it.
    """

    decided_by_evaluation = False

    def __init__(self, model: nn.Module, decay: float | None = None, *, uniform_from: int | None = None) -> None:
        if (decay is None) == (uniform_from is None):
            raise ValueError("give either decay or uniform_from")
        self._model = model
        self._decay, self._uniform_from = decay, uniform_from
        # Asked again, a model that FSDP2 has gathered names the gathered parameters.
        self._sources: dict[str, Tensor] = dict(model.named_parameters())
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        self._sources |= self._buffers
        self._averages = {
            # In bfloat16 an update of 1 - decay would round to nothing.
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            for name, tensor in self._sources.items()
        }
        self._shards = [local_shard(average) for average in self._averages.values()]
        self._updates = torch.zeros((), dtype=torch.float64, device=self._shards[0].device)
        self._in_one_launch = self._updates.is_cuda  # on a CPU lerp rounds less

    @torch.no_grad()
    def update(self, skipped: Tensor | None = None) -> None:
        """Take the weights into the average, but not where ``skipped`` (0-d, on the device) is 1."""
        made = 1.0 if skipped is None else 1 - skipped.to(self._updates)
        weight = made * self._weight()
        weights = {dtype: weight.to(dtype) for dtype in {average.dtype for average in self._shards}}
        alike: list[tuple[Tensor, Tensor]] = []
        for source, average in zip(self._current(), self._shards, strict=True):
            if self._in_one_launch and source.dtype == average.dtype == torch.float32:
                alike.append((average, source))
            else:
                average.lerp_(source.to(average.dtype), weights[average.dtype])
        if alike:
            _lerp_all([average for average, _ in alike], [source for _, source in alike], weights[torch.float32])
        self._updates += made

    def _weight(self) -> Tensor:
        """Of the weights after the coming update, float64 0-d."""
        if self._uniform_from is not None:
            return 1 / (self._updates + (3 - self._uniform_from)).clamp(min=1)
        return 1 - ((1 + self._updates) / (10 + self._updates)).clamp(max=self._decay)

    def buffers(self) -> dict[str, Tensor]:
        """The averages of the model's buffers, which differ between processes within an epoch; not copies."""
        return {name: average for name, average in self._averages.items() if name in self._buffers}

    def average_buffers(self, world: Distributed) -> None:
        """Give every rank the mean of all ranks' averaged buffers, as the model's own are before they are used."""
        average_over_ranks(list(self.buffers().values()), world)

    def evaluated(self, loss: float) -> None:
        """The weights have been evaluated, with this validation loss."""

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the average as its weights inside, and the exact weights again afterwards, also after an error.

        Costs a copy of the weights while it lasts.
        """
        with self._swapped(self._shards):
            yield

    @contextmanager
    def _swapped(self, shards: list[Tensor]) -> Iterator[None]:
        kept = [source.detach().clone() for source in self._current()]
        try:
            self._overwrite(shards)
            yield
        finally:
            self._overwrite(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Each average by its parameter's or buffer's name, sharded as that is; to be saved, or loaded into.

        ``n_averaged``, float64 0-d, counts the updates (the name is torch's `AveragedModel`'s).
        """
        return {**self._averages, "n_averaged": self._updates}

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        for source, value in zip(self._current(), values, strict=True):
            source.copy_(value)  # in place: FSDP2 gathers from this memory, whatever `p.data` is
        reshard(self._model)

    @torch.no_grad()
    def _current(self) -> list[Tensor]:
        """Read anew each time: loading a checkpoint may move a shard."""
        return [local_shard(source) for source in self._sources.values()]


def _lerp_all(averages: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    """``average <- average - weight * (average - source)`` for all, in one launch and with a weight on the device.

    An SGD step on ``(average - source)^2 / 2``: to maximize along the source, with a weight decay of 1. torch's other
    operations on lists take such a weight from the host, which would wait for it, or make a launch for each tensor.
    """
    torch._fused_sgd_(
        averages,
        sources,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=weight,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
    )
