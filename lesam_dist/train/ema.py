"""An exponential moving average of the weights: average = decay * average + (1 - decay) * weights, after every update.

It begins as the initial weights. The mathematics is `torch.optim.swa_utils`'; here is what holds the average where the
weights are sharded, evaluates with it and saves it. Buffers (BatchNorm's running statistics) are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lesam_dist.parallel import local_shard


class WeightAverage:
    """The average of a model's parameters, in float32 or better; of its own shards on each process.

    Args:
        model: wrapped already where it is sharded: FSDP2 replaces the parameters.
        decay: share of the average that an update keeps, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._average_all = get_ema_multi_avg_fn(decay)
        # Asked again, a model that FSDP2 has gathered names the gathered parameters.
        self._params = list(model.parameters())
        self._averages = {
            # In bfloat16 an update of 1 - decay would round to nothing.
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in model.named_parameters()
        }
        self._shards = [local_shard(average) for average in self._averages.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights into the average. A step that was skipped counts as one that did not move them."""
        weights = [w.to(average.dtype) for w, average in zip(self._weights(), self._shards, strict=True)]
        self._average_all(self._shards, weights, None)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the average as its weights inside, and the exact weights again afterwards, also after an error.

        Costs a copy of the weights while it lasts.
        """
        kept = [w.detach().clone() for w in self._weights()]
        try:
            self._overwrite(self._shards)
            yield
        finally:
            self._overwrite(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each parameter by its name, sharded as the parameter is; to be saved, or loaded into."""
        return dict(self._averages)

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        for w, value in zip(self._weights(), values, strict=True):
            w.copy_(value)  # in place: FSDP2 gathers from this memory, whatever `p.data` is
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation with reshard_after_forward=False leaves the old values gathered

    @torch.no_grad()
    def _weights(self) -> list[Tensor]:
        """Read anew each time: loading a checkpoint may move a shard."""
        return [local_shard(p) for p in self._params]
